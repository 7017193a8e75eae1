package integration

import (
	"fmt"
	"path/filepath"
	"testing"
)

// target is any NBD server that the peers' tests talk to.
type target struct {
	*process
	kind   string
	image  string
	socket string
	uri    string
}

// targetOptions are what every kind of target can do.
type targetOptions struct {
	name, description string
	readOnly          bool
}

// everyServer runs a test of the protocol against nbd-export, and, so that the
// test itself is tested, against qemu-nbd.
func everyServer(t *testing.T, f func(t *testing.T, kind string)) {
	for _, kind := range []string{"nbd-export", "qemu-nbd"} {
		t.Run(kind, func(t *testing.T) { f(t, kind) })
	}
}

func startTarget(t testing.TB, kind, image string, o targetOptions) *target {
	t.Helper()
	tg := &target{kind: kind, image: image}
	switch kind {
	case "nbd-export":
		var flags []string
		if o.name != "" {
			flags = append(flags, "--export-name", o.name)
		}
		if o.description != "" {
			flags = append(flags, "--description", o.description)
		}
		if o.readOnly {
			flags = append(flags, "--read-only")
		}
		e := serve(t, image, flags...)
		tg.process, tg.socket = e.process, e.socket
	case "qemu-nbd":
		need(t, "qemu-nbd", "qemu-utils")
		dir := shortDir(t)
		tg.socket = filepath.Join(dir, "nbd")
		pidFile := filepath.Join(dir, "pid")
		argv := []string{"qemu-nbd", "--format=raw", "--socket=" + tg.socket, "--pid-file=" + pidFile,
			"--persistent", "--shared=0", "--discard=unmap", "--export-name=" + o.name}
		if o.description != "" {
			argv = append(argv, "--description="+o.description)
		}
		if o.readOnly {
			argv = append(argv, "--read-only")
		}
		tg.process = spawn(t, kind, nil, append(argv, image)...)
		waitReady(tg.process, pidFile)
	default:
		t.Fatalf("no server %q", kind)
	}
	tg.uri = nbdURI(o.name, tg.socket)
	return tg
}

// python runs a script with libnbd's h, the URI and helpers at hand.
func python(t testing.TB, uri, script string) string {
	t.Helper()
	need(t, "nbdsh", "python3-libnbd")
	r := tryRunInput(t, pythonPrelude+script, "nbdsh", "-c", fmt.Sprintf("uri = %q", uri), "-c", "-")
	if r.code != 0 {
		t.Fatalf("nbdsh: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

const pythonPrelude = `
import errno, nbd

def connect(*contexts):
    """A connection that sends what it is told, and keeps what the server says."""
    h = nbd.NBD()
    for c in contexts:
        h.add_meta_context(c)
    h.server_says = []
    h.set_debug(True)
    h.set_debug_callback(lambda where, msg: h.server_says.append(msg))
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    h.set_strict_mode(0)
    return h

def fails(want, f, *args, **kw):
    """f must fail with the errno named want."""
    try:
        f(*args, **kw)
    except nbd.Error as e:
        assert e.errno == want, "%s%r: %s, want %s" % (f.__name__, args, e, want)
        return
    assert False, "%s%r succeeded, want %s" % (f.__name__, args, want)
`

// serveQSD starts QEMU's storage daemon as an exporter that speaks the same
// control protocol, to test the tests of that.
func serveQSD(t testing.TB, image string, inactive bool) *daemon {
	t.Helper()
	return serveQSDFormat(t, image, "raw", inactive)
}

func serveQSDFormat(t testing.TB, image, format string, inactive bool) *daemon {
	t.Helper()
	need(t, "qemu-storage-daemon", "qemu-system-common")
	dir := shortDir(t)
	e := &daemon{image: image, socket: filepath.Join(dir, "nbd"),
		control: filepath.Join(dir, "ctl"), pidFile: filepath.Join(dir, "pid")}
	active := "on"
	if inactive {
		active = "off"
	}
	e.process = spawn(t, "qemu-storage-daemon", nil, "qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=file0,discard=unmap,active="+active+",filename="+image,
		"--blockdev", "driver="+format+",node-name=disk0,discard=unmap,file=file0,active="+active,
		"--nbd-server", "addr.type=unix,max-connections=0,addr.path="+e.socket,
		"--export", "type=nbd,id=export0,node-name=disk0,name=,writable=on,allow-inactive=on",
		"--chardev", "socket,id=control,server=on,wait=off,path="+e.control, "--monitor", "chardev=control",
		"--pidfile", e.pidFile)
	waitReady(e.process, e.pidFile)
	return e
}
