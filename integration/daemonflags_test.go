package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Both daemons take the same options, in whatever form they are written, and
// refuse the same with the same texts.
func TestSameFlags(t *testing.T) {
	const (
		server = "addr.type=unix,addr.path=nbd"
		image  = "qcow2,node-name=q,file.driver=file,file.filename=b.qcow2"
	)
	var both [2]string // directories
	for i := range managers {
		both[i] = shortDir(t)
		if err := os.WriteFile(filepath.Join(both[i], "a,b=c.img"), make([]byte, 4096), 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, "sh", "-ec", `cd "$1"
			qemu-img create -q -f qcow2 b.qcow2 1M
			qemu-img bitmap --add --disable b.qcow2 one
			qemu-img bitmap --add --disable b.qcow2 two`, "", both[i])
	}
	for _, flags := range [][]string{
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img"},
		{"--blockdev", "filename=a,,b=c.img,node-name=f,driver=file,"},
		{"--blockdev", "driver=file,driver=file,node-name=g,node-name=f,filename=none,filename=a,,b=c.img,read-only=yes"},
		{"--blockdev", `{"driver":"file","node-name":"f","filename":"a,b=c.img"}`},
		{"--blockdev", `{'driver':'file','node-name':'f','filename':'a,b=c.img'} `},
		{"--blockdev", image + ",backing=,l2-cache-size=65536"},
		{"--blockdev", image, "--nbd-server", server, "--export", "nbd,id=e,node-name=q,bitmaps.0=one"},
		{"--blockdev", image, "--nbd-server", server, "--export", "nbd,id=e,node-name=q,bitmaps.1=one,bitmaps.0.node=q,bitmaps.0.name=two"},
		{"--nbd-server", `{"addr":{"type":"unix","path":"nbd"},"max-connections":1}`},

		{"--blockdev", ""},
		{"--blockdev", "file"},
		{"--blockdev", "file,node-name"},
		{"--blockdev", "driver=file,node-name,filename=x"},
		{"--blockdev", "file,=x"},
		{"--blockdev", ",file"},
		{"--blockdev", "file,cache..direct=on"},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,read-only=ON"},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,cache.direct="},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,cache=x,cache.direct=on"},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,cache.direct=on,cache=x"},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,cache.0=x,cache.direct=on"},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,cache.1=x"},
		{"--blockdev", "file,node-name=f,filename=a,,b=c.img,cache.0=x"},
		{"--blockdev", image + ",l2-cache-size=1M"},
		{"--blockdev", image + ",l2-cache-size="},
		{"--blockdev", image + ",l2-cache-size=-1"},
		{"--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=a,,b=c.img"},
		{"--blockdev", `{"driver":"file"`},
		{"--blockdev", `{"driver":"file"} {}`},
		{"--blockdev", `{"driver":"file",}`},
		{"--blockdev", `{"driver":"file","node-name":"f","filename":"a,b=c.img","read-only":"on"}`},
		{"--nbd-server", "addr.path=nbd"},
		{"--nbd-server", "addr.type=unix"},
		{"--nbd-server", "x"},
		{"--nbd-server", server + ",max-connections=x"},
		{"--nbd-server", "addr.type=inet,addr.host=::1,addr.port=0,addr.ipv4=1"},
		{"--nbd-server", `{"addr":{"path":"nbd"}}`},
		{"--nbd-server", server, "--nbd-server", server},
		{"--blockdev", image, "--nbd-server", server, "--export", "nbd,id=e,node-name=q,writable=1"},
		{"--blockdev", image, "--nbd-server", server, "--export", "nbd,id=e,node-name=q,bitmaps=one"},
		{"--blockdev", image, "--nbd-server", server, "--export", "nbd,id=e,node-name=q,bitmaps.1=one"},
		{"--blockdev", image, "--nbd-server", server, "--export", "nbd,id=e,node-name=q,bitmaps.0=none"},
	} {
		var answers [2]string
		for i, kind := range managers {
			answers[i] = startedWith(t, kind, both[i], flags)
		}
		if !strings.HasPrefix(answers[0], answers[1]) || answers[1] == "" && answers[0] != "" {
			t.Errorf("%q: %q, theirs %q", flags, answers[0], answers[1])
		}
	}
}

// startedWith starts a daemon and says why it does not run with these flags, "" if it
// does. A refusal begins with the last of them.
func startedWith(t *testing.T, kind, dir string, flags []string) string {
	t.Helper()
	pidFile := filepath.Join(dir, "pid")
	argv := []string{program(t), "daemon", "--control", "ctl", "--pid-file", pidFile}
	if kind == "qemu-storage-daemon" {
		need(t, kind, "qemu-system-common")
		argv = []string{kind, "--pidfile", pidFile}
	}
	p := spawn(t, kind, func(c *exec.Cmd) { c.Dir = dir }, append(argv, flags...)...)
	waitFor(t, startTimeout, kind+" runs or has ended", func() bool { return !p.alive() || saysReady(p, pidFile) })
	if p.alive() {
		p.stop()
		return ""
	}
	_, why, found := strings.Cut(p.log.String(), strings.Join(flags[len(flags)-2:], " ")+": ")
	if !found {
		t.Errorf("%s %q said %s", kind, flags, p.log)
	}
	return strings.TrimSpace(why)
}
