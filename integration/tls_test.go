package integration

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/internal/testcerts"
)

// overTLS serves an image on TCP with TLS, with more flags, and returns the
// address, and the directories of two clients: one that the server's authority
// has signed, and one that another has.
func overTLS(t *testing.T, image string, flags ...string) (e *daemon, port, known, stranger string) {
	t.Helper()
	need(t, "nbdinfo", "libnbd-bin")
	certs := t.TempDir()
	known, stranger = filepath.Join(certs, "known"), filepath.Join(certs, "stranger")
	ours, theirs := testcerts.New(t), testcerts.New(t)
	ours.Server(filepath.Join(certs, "server"))
	ours.Client(known, "known")
	theirs.Client(stranger, "stranger")
	// It trusts our server all the same.
	ca := readFile(t, filepath.Join(known, "ca-cert.pem"))
	if err := os.WriteFile(filepath.Join(stranger, "ca-cert.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	e = serve(t, image, append(flags, "--port", "0", "--tls-certificates", filepath.Join(certs, "server"))...)
	line := e.log.wait(t, 0, "the TCP address", func(l string) bool { return strings.Contains(l, "tcp:127.0.0.1:") })
	_, port, err := net.SplitHostPort(line[strings.Index(line, "127.0.0.1:"):])
	if err != nil {
		t.Fatal(err)
	}
	return e, port, known, stranger
}

func TestTLS(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 5, 16*mib)
	e, port, known, stranger := overTLS(t, image)
	uri := func(dir string) string { return "nbds://localhost:" + port + "/?tls-certificates=" + dir }
	if out := run(t, "nbdinfo", uri(known)); !strings.Contains(out, "with TLS") || !strings.Contains(out, "structured") {
		t.Errorf("nbdinfo:\n%s", out)
	}
	// Both ways, by libnbd and by QEMU, over both kinds of sockets.
	copied := filepath.Join(tmpfsDir(t), "copy")
	run(t, "nbdcopy", uri(known), copied)
	sameBytes(t, "read by nbdcopy", readFile(t, copied), readFile(t, image))
	fresh := randomBytes(6, 16*mib)
	if err := os.WriteFile(copied, fresh, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "nbdcopy", copied, uri(known))
	sameBytes(t, "written by nbdcopy", readFile(t, image), fresh)
	creds := func(dir string) []string {
		return []string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + dir, "--image-opts"}
	}
	for _, server := range []string{"file.host=localhost,file.port=" + port, "file.path=" + e.socket + ",file.tls-hostname=localhost"} {
		argv := append([]string{"qemu-img", "compare"}, creds(known)...)
		run(t, append(argv, "driver=raw,file.driver=nbd,file.tls-creds=tls0,"+server, "driver=raw,file.driver=file,file.filename="+copied)...)
	}
	// A client of TLS keeps its connection through a change of owner.
	argv := append([]string{"qemu-io"}, creds(known)...)
	argv = append(argv, "driver=raw,file.driver=nbd,file.tls-creds=tls0,file.host=localhost,file.port="+port)
	e.inactivate()
	if r := tryRun(t, append(argv, "-c", "write 0 4k")...); !strings.Contains(r.stdout+r.stderr, "Operation not permitted") {
		t.Errorf("a write while inactive: %s%s", r.stdout, r.stderr)
	}
	e.activate()
	run(t, append(argv, "-c", "write -P 9 0 4k", "-c", "read -P 9 0 4k")...)

	for who, r := range map[string]result{
		"without TLS":             tryRun(t, "nbdinfo", "--size", "nbd://localhost:"+port),
		"without TLS, by a path":  tryRun(t, "nbdinfo", "--size", e.uri()),
		"list without TLS":        tryRun(t, "nbdinfo", "--list", "nbd://localhost:"+port),
		"with a stranger's":       tryRun(t, "nbdinfo", "--size", uri(stranger)),
		"with the server's alone": tryRun(t, "nbdinfo", "--size", uri(filepath.Join(filepath.Dir(known), "server"))),
	} {
		if r.code == 0 {
			t.Errorf("%s: %s", who, r.stdout)
		}
	}
	e.log.wait(t, 0, "a refusal with its reason", func(l string) bool {
		return strings.Contains(l, "no handshake") && strings.Contains(l, "unknown authority")
	})
	e.log.wait(t, 0, "who has connected", func(l string) bool {
		return strings.Contains(l, "over TLS") && strings.Contains(l, "CN=known")
	})
}

// Anybody may connect, but not without TLS.
func TestTLSAnyClient(t *testing.T) {
	_, port, _, stranger := overTLS(t, sparseImage(t, t.TempDir(), mib), "--tls-clients", "any")
	run(t, "nbdinfo", "--size", "nbds://localhost:"+port+"/?tls-certificates="+stranger)
	if r := tryRun(t, "nbdinfo", "--size", "nbd://localhost:"+port); r.code == 0 {
		t.Errorf("without TLS: %s", r.stdout)
	}
}

// As qemu-storage-daemon, by flags.
func TestTLSDaemon(t *testing.T) {
	need(t, "nbdinfo", "libnbd-bin")
	dir := shortDir(t)
	image, certs, client := sparseImage(t, dir, mib), filepath.Join(dir, "server"), filepath.Join(dir, "client")
	a := testcerts.New(t)
	a.Server(certs)
	a.Client(client, "client")
	ctl, socket, pid := filepath.Join(dir, "ctl"), filepath.Join(dir, "nbd"), filepath.Join(dir, "pid")
	p := spawn(t, "nbd-export", nil, program(t), "daemon", "--control", ctl, "--pid-file", pid,
		"--object", "tls-creds-x509,id=tls0,endpoint=server,dir="+certs,
		"--nbd-server", "addr.type=unix,addr.path="+socket+",tls-creds=tls0",
		"--blockdev", "raw,node-name=disk,file.driver=file,file.filename="+image, "--export", "nbd,id=e,node-name=disk,name=")
	waitReady(p, pid)
	run(t, "nbdinfo", "--size", "nbds+unix://localhost/?socket="+socket+"&tls-certificates="+client)
	if r := tryRun(t, "nbdinfo", "--size", nbdURI("", socket)); r.code == 0 {
		t.Errorf("without TLS: %s", r.stdout)
	}
	p.stop()
	wantFailure(t, cli(t, "daemon", "--control", ctl, "--object", "tls-creds-x509,id=t,endpoint=server,dir="+client), 1,
		"--object", "server-cert.pem: no such file or directory")
	wantFailure(t, cli(t, "daemon", "--control", ctl, "--nbd-server", "addr.type=unix,addr.path="+socket+",tls-authz=x"), 1, "'tls-authz' is not supported")
}

// A stop answers what TLS clients have asked, and waits for none that does not
// read.
func TestTLSStop(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 7, 16*mib)
	e, port, known, _ := overTLS(t, image)
	idle := spawn(t, "nbdcopy", nil, "nbdcopy", "nbds://localhost:"+port+"/?tls-certificates="+known, "-")
	e.log.wait(t, 0, "the client", func(l string) bool { return strings.Contains(l, "over TLS") })
	e.stop()
	idle.wait(startTimeout)
	if _, rest, _ := bytes.Cut([]byte(e.log.String()), []byte("stopping")); bytes.Contains(rest, []byte("cut off")) {
		t.Errorf("clients were cut off:\n%s", rest)
	}
}
