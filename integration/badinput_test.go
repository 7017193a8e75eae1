package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// serveFails runs "serve" on Unix sockets, which must fail at once.
func serveFails(t testing.TB, code int, args []string, contains ...string) {
	t.Helper()
	dir := shortDir(t)
	argv := append([]string{"serve", "--control", dir + "/ctl"}, args...)
	if !slices.Contains(args, "-k") && !slices.Contains(args, "-p") {
		argv = append(argv, "-k", dir+"/nbd")
	}
	wantFailure(t, cli(t, argv...), code, contains...)
	if left, _ := filepath.Glob(dir + "/*"); len(left) != 0 {
		t.Errorf("left behind by the failed start: %v", left)
	}
}

func TestBadImages(t *testing.T) {
	dir := t.TempDir()
	file := sparseImage(t, dir, mib)
	fifo, socket, loop := dir+"/fifo", dir+"/socket", dir+"/loop"
	if err := errors.Join(syscall.Mkfifo(fifo, 0o600), os.Symlink(loop, loop), os.Symlink(dir+"/gone", dir+"/dangling"),
		syscall.Mknod(socket, syscall.S_IFSOCK|0o600, 0)); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ path, says string }{
		"missing":                {dir + "/none.img", "no such file"},
		"dangling link":          {dir + "/dangling", "no such file"},
		"directory":              {dir, "directory"},
		"below a file":           {file + "/x", "not a directory"},
		"link to itself":         {loop, "symbolic links"},
		"FIFO":                   {fifo, fifo},
		"socket":                 {socket, socket},
		"character device":       {"/dev/null", "/dev/null"},
		"name beyond all limits": {dir + "/" + strings.Repeat("x", 5000), "name too long"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, flag := range [][]string{{"-f", "raw"}, {"-f", "auto"}, {"-f", "raw", "--inactive"}, {"-f", "raw", "-r"}} {
				serveFails(t, 1, append(flag, tt.path), tt.says)
			}
		})
	}
}

// An image that the server may not read, or not write.
func TestUnreadableImage(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "nbdx")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	image := sparseImage(t, dir, mib)
	prepare := func(*exec.Cmd) {}
	self := program(t)
	if os.Getuid() == 0 { // whom no mode stops
		self = filepath.Join(dir, "nbd-export")
		if err := os.WriteFile(self, readFile(t, program(t)), 0o755); err != nil {
			t.Fatal(err)
		}
		prepare = func(c *exec.Cmd) {
			c.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
		}
	}
	fails := func(args ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		cmd := command(ctx, append([]string{self, "serve", "-f", "raw", "-k", dir + "/nbd"}, args...)...)
		prepare(cmd)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		cmd.Run()
		wantFailure(t, result{"", stderr.String(), cmd.ProcessState.ExitCode()}, 1, image, "permission denied")
	}
	if err := os.Chmod(image, 0); err != nil {
		t.Fatal(err)
	}
	fails(image)
	fails("--inactive", image)
	fails("--read-only", image)
	if err := os.Chmod(image, 0o444); err != nil {
		t.Fatal(err)
	}
	fails(image)
	// It can be served without ownership, but who is to take over has to know.
	p := spawn(t, "nbd-export", prepare, self, "serve", "-f", "raw", "-k", dir+"/nbd", "--inactive", image)
	p.log.wait(t, 0, "the image cannot be written", func(l string) bool {
		return strings.Contains(l, "warn") && strings.Contains(l, "could not be activated") && strings.Contains(l, "permission denied")
	})
	p.stop()
}

func TestBadFormats(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	dir := t.TempDir()
	qcow2 := dir + "/disk.qcow2"
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", qcow2, "1M")
	before := snap(t, qcow2)
	// A guess leads to no other file.
	overlay := dir + "/overlay.qcow2"
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", overlay)
	r := cli(t, "serve", "-k", shortDir(t)+"/nbd", overlay)
	wantFailure(t, r, 1, overlay, "-f qcow2")
	sameSnap(t, qcow2, before)
	serveFails(t, 2, []string{"-f", "vmdk", qcow2}, "vmdk")
}

// A guest must not be able to turn a disk probed as raw into another format.
func TestProbedRawKeepsItsFormat(t *testing.T) {
	image := sparseImage(t, tmpfsDir(t), mib)
	e := serve(t, image, "-f", "auto")
	e.log.wait(t, 0, "the format is a guess", func(l string) bool {
		return strings.Contains(l, "warn") && strings.Contains(l, "taken to be raw")
	})
	c := dialRaw(t, e.socket, "")
	header := append([]byte("QFI\xfb\x00\x00\x00\x03"), make([]byte, 504)...)
	for _, magic := range [][]byte{header, append(header, make([]byte, 65536)...), header[:4]} {
		rep := c.want(nbdEPERM, cmdWrite, 0, 0, uint32(len(magic)), magic)
		if !strings.Contains(rep.text, "-f raw") {
			t.Errorf("the error does not name -f raw: %q", rep.text)
		}
	}
	// In pieces, the last of which would complete it.
	c.want(0, cmdWrite, 0, 1, 2, header[1:3])
	c.want(0, cmdWrite, 0, 3, 1, header[3:4])
	c.want(nbdEPERM, cmdWrite, 0, 0, 1, header[:1])
	c.want(0, cmdWrite, 0, 4096, 512, header)
	c.want(0, cmdWrite, 0, 0, 512, bytes.Repeat([]byte{0xeb}, 512))
	e.stop()

	// Told that it is raw, it is raw.
	e = serve(t, image)
	dialRaw(t, e.socket, "").want(0, cmdWrite, 0, 0, 512, header)
}

func TestBadSockets(t *testing.T) {
	image := sparseImage(t, tmpfsDir(t), mib)
	live := serve(t, image, "--inactive")
	t.Run("in use", func(t *testing.T) {
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "-k", live.socket, image}, live.socket)
		dialRaw(t, live.socket, "").Close()
	})
	t.Run("too long", func(t *testing.T) {
		long := "/tmp/" + strings.Repeat("x", 120)
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "-k", long, image}, long, "107") // bytes at most
	})
	t.Run("no directory", func(t *testing.T) {
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "-k", "/tmp/none/such", image}, "/tmp/none/such")
	})
	t.Run("a file is there", func(t *testing.T) {
		path := shortDir(t) + "/precious"
		if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
			t.Fatal(err)
		}
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "-k", path, image}, path)
		if string(readFile(t, path)) != "data" {
			t.Error("a file that is no socket was replaced")
		}
	})
	t.Run("port in use", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "-p", port, image}, port, "in use")
	})
	t.Run("no such address", func(t *testing.T) {
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "-p", "10999", "-b", "192.0.2.1", image}, "192.0.2.1")
	})
	t.Run("the pid file cannot be", func(t *testing.T) {
		serveFails(t, 1, []string{"-f", "raw", "--inactive", "--pid-file", "/tmp/none/such", image}, "/tmp/none/such")
	})
}

func TestTCP(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, mib)
	port := freePort(t)
	e := serve(t, image, "-p", port, "-b", "127.0.0.1", "-x", "disk") // and the Unix socket
	uri := "nbd://127.0.0.1:" + port + "/disk"
	mustQemuIO(t, uri, "write -P 9 0 64k", "read -P 9 0 64k")
	mustQemuIO(t, e.uri(), "read -P 9 0 64k")
}

func TestExportNames(t *testing.T) {
	image := sparseImage(t, tmpfsDir(t), mib)
	long := strings.Repeat("n", 4096)
	e := serve(t, image, "--inactive", "-x", long)
	dialRaw(t, e.socket, long).Close()

	for name, tt := range map[string]struct {
		name string
		kind uint32
	}{
		"unknown": {"other", repErrUnknown}, "empty": {"", repErrUnknown}, "prefix": {long[:4095], repErrUnknown},
		"over 4096 bytes": {long + "n", repErrInvalid}, "much over": {strings.Repeat("n", 60000), repErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			c := dialNBD(t, "unix", e.socket)
			c.clientFlags(3)
			for _, opt := range []uint32{optInfo, optGo} {
				replies := c.option(opt, goQuery(tt.name))
				if len(replies) != 1 || replies[0].kind&(1<<31) == 0 ||
					len(tt.name) <= 4096 && replies[0].kind != tt.kind {
					t.Errorf("option %d: %+v", opt, replies)
				}
			}
			c.goExport(long) // still haggling
			c.want(0, cmdRead, 0, 0, 512, nil)

			c = dialNBD(t, "unix", e.socket)
			c.clientFlags(3)
			c.write(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), optExportName), uint32(len(tt.name))))
			c.Write([]byte(tt.name)) // may fail: the server may know enough
			c.wantClosed(startTimeout)
		})
	}
	dialRaw(t, e.socket, long).want(0, cmdRead, 0, 0, 512, nil)

	serveFails(t, 2, []string{"-f", "raw", "--inactive", "-x", long + "n", image}, "4096")
	serveFails(t, 2, []string{"-f", "raw", "--inactive", "-D", long + "n", image}, "4096")
}

// What is no handshake ends that connection, soon, and no other.
func TestGarbageInsteadOfHandshake(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	other := dialRaw(t, e.socket, "")
	option := func(opt, length uint32) []byte {
		b := append(binary.BigEndian.AppendUint32(nil, 3), "IHAVEOPT"...)
		return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, opt), length)
	}
	for name, garbage := range map[string][]byte{
		"HTTP":                 []byte("GET / HTTP/1.1\r\nHost: example\r\n\r\n"),
		"TLS":                  []byte("\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00" + strings.Repeat("\x00", 64)),
		"random":               randomBytes(3, 4096),
		"zeroes":               make([]byte, 4096),
		"ones":                 bytes.Repeat([]byte{0xff}, 4096),
		"flags, then garbage":  append([]byte{0, 0, 0, 3}, bytes.Repeat([]byte{'x'}, 64)...),
		"an option of 4 GiB":   append(option(optGo, 1<<32-1), make([]byte, 1024)...),
		"an option of 100 MiB": append(option(4711, 100*mib), make([]byte, 1024)...),
	} {
		t.Run(name, func(t *testing.T) {
			c := dialNBD(t, "unix", e.socket)
			c.Write(garbage)
			c.wantClosed(8 * time.Second) // before a handshake is given up
			wantServes(t, other, 0, 1)
		})
	}
	t.Run("vanished", func(t *testing.T) {
		for _, part := range [][]byte{nil, {0}, {0, 0, 0, 3}, option(optGo, 100), append(option(optGo, 100), 1, 2, 3)} {
			c := dialNBD(t, "unix", e.socket)
			c.write(part)
			c.Close()
		}
		wantServes(t, other, 0, 2)
	})
}

// Who does not finish the handshake loses the connection after 10 s.
func TestHandshakeTakesTooLong(t *testing.T) {
	t.Parallel()
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	done := make(chan struct{})
	for _, say := range []string{"", "\x00\x00\x00\x03", "\x00\x00\x00\x03IHAVE"} {
		c := dialNBD(t, "unix", e.socket)
		c.Write([]byte(say))
		go func() {
			begin := time.Now()
			c.SetReadDeadline(begin.Add(30 * time.Second))
			_, err := io.Copy(io.Discard, c.Conn)
			if took := time.Since(begin); took < 8*time.Second || took > 20*time.Second {
				t.Errorf("after %q the connection ended after %v (%v), want 10 s", say, took, err)
			}
			done <- struct{}{}
		}()
	}
	served := dialRaw(t, e.socket, "") // silent, but past the handshake
	for range 3 {
		<-done
	}
	wantServes(t, served, 0, 1)
}

func TestConnectionLimit(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib), "--shared", "2")
	first, second := dialRaw(t, e.socket, ""), dialRaw(t, e.socket, "")
	n := len(e.log.lines())
	for range 3 {
		c, err := net.Dial("unix", e.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(startTimeout))
		if b, err := io.ReadAll(c); err != nil && !errors.Is(err, syscall.ECONNRESET) || len(b) != 0 {
			t.Errorf("a third connection got %d bytes, %v", len(b), err)
		}
	}
	e.log.wait(t, n, "a connection over the limit", func(l string) bool { return strings.Contains(l, "limit") || strings.Contains(l, "shared") })
	wantServes(t, first, 0, 1)
	wantServes(t, second, 0, 2)
	first.Close()
	waitFor(t, startTimeout, "a place is free again", func() bool {
		c, err := net.Dial("unix", e.socket)
		if err != nil {
			return false
		}
		defer c.Close()
		c.SetReadDeadline(time.Now().Add(startTimeout))
		_, err = io.ReadFull(c, make([]byte, 18))
		return err == nil
	})
	wantServes(t, second, 0, 3)
}

// A client that vanishes within a payload has written nothing and disturbs
// nobody.
func TestClientVanishesInPayload(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, 64*mib)
		e := serve(t, image)
		other := dialRaw(t, e.socket, "")
		sum := snap(t, image).sha256
		for i, sent := range []uint32{0, 1, 4095, 65536, 3*mib + 1, 16*mib - 1} {
			c := stalledWrite(t, e, 16*mib, sent)
			if i%2 == 0 {
				c.Conn.(*net.UnixConn).CloseWrite()
				c.wantClosed(startTimeout)
			}
			c.Close()
			other.want(0, cmdRead, 0, 0, 4096, nil)
		}
		waitFor(t, startTimeout, "the dead connections are gone", func() bool {
			fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", e.pid))
			return len(fds) < 40
		})
		if snap(t, image).sha256 != sum {
			t.Error("a part of a write whose client vanished is in the image")
		}
		wantServes(t, other, 0, 1)
		e.inactivate()
		e.activate()
		wantServes(t, other, 0, 2)
	})
}

// Neither a client stalled in a payload nor one that never reads its replies
// delays an inactivation: 100 ms on tmpfs, measured at the control command.
func TestClientsDoNotDelayInactivation(t *testing.T) {
	const bound = 100 * time.Millisecond
	for name, hinder := range map[string]func(t *testing.T, e *daemon){
		"none": func(*testing.T, *daemon) {},
		"stalled in a payload": func(t *testing.T, e *daemon) {
			for _, sent := range []uint32{0, 4096, mib, 31 * mib} {
				stalledWrite(t, e, 32*mib, sent)
			}
		},
		"stalled in a header": func(t *testing.T, e *daemon) {
			dialRaw(t, e.socket, "").write(requestHeader(cmdWrite, 0, 1, 0, 4096)[:13])
		},
		"never reading": func(t *testing.T, e *daemon) {
			for range 3 {
				neverRead(t, e)
			}
		},
		"writing and never reading": func(t *testing.T, e *daemon) {
			c := dialRaw(t, e.socket, "")
			go func() { // until the server does not take any more
				c.SetWriteDeadline(time.Now().Add(3 * time.Second))
				for i := uint64(0); ; i++ {
					b := requestHeader(cmdRead, 0, 2*i, 0, mib)[:28]
					b = append(b, append(requestHeader(cmdWrite, 0, 2*i+1, mib, 65536), make([]byte, 65536)...)...)
					if _, err := c.Write(b); err != nil {
						return
					}
				}
			}()
		},
		"all of them": func(t *testing.T, e *daemon) {
			for range 5 {
				neverRead(t, e)
				stalledWrite(t, e, 32*mib, 12345)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			image := randomImage(t, tmpfsDir(t), 1, 64*mib)
			e := serve(t, image)
			hinder(t, e)
			busy := dialRaw(t, e.socket, "")
			time.Sleep(200 * time.Millisecond) // the server has taken what it takes
			q := e.qmp()
			var took []time.Duration
			for i := range int64(7) {
				wantServes(t, busy, 40*mib, i)
				begin := time.Now()
				q.must("blockdev-set-active", map[string]any{"active": false})
				took = append(took, time.Since(begin))
				wantLocks(t, image, nil)
				q.must("blockdev-set-active", map[string]any{"active": true})
			}
			t.Logf("inactivations took %v", took)
			slices.Sort(took)
			// Some may have had bad luck with the scheduler, a client never
			// delays just these.
			if took[len(took)/2] > bound {
				t.Errorf("inactivations took %v, bound %v", took, bound)
			}
			e.kill()
			e.ended = true
		})
	}
}

// A write is judged when all of it is here, by the state of that moment.
func TestStalledWriteIsJudgedWhenComplete(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, 4*mib)
	e := serve(t, image)
	before := snap(t, image).sha256
	payload := make([]byte, mib)
	late := func(c *rawConn, want uint32) {
		t.Helper()
		c.write(payload[mib/2:])
		if rep := c.receive(0, 0); rep.errno != want || want == nbdEPERM && rep.text != inactiveText {
			t.Errorf("the late write: %s %q, want %s", errName(rep.errno), rep.text, errName(want))
		}
		c.want(0, cmdRead, 0, 0, 512, nil)
	}
	c := stalledWrite(t, e, mib, mib/2)
	e.inactivate()
	late(c, nbdEPERM)
	if snap(t, image).sha256 != before {
		t.Error("a refused write changed the image")
	}
	c = stalledWrite(t, e, mib, mib/2) // begun while inactive
	e.activate()
	late(c, 0)
	sameBytes(t, "the write", fileAt(t, image, 0, mib), payload)
}

// Many stalled payloads take the memory that is set and no more, and hold up
// nobody else.
func TestMemoryIsBounded(t *testing.T) {
	e := serve(t, randomImage(t, tmpfsDir(t), 1, 64*mib), "--memory", "128M")
	var wg sync.WaitGroup
	for range 40 {
		c := dialRaw(t, e.socket, "")
		wg.Go(func() { // the server may stop receiving
			c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			c.Write(append(requestHeader(cmdWrite, 0, 1, 0, 32*mib)[:28], make([]byte, 31*mib)...))
		})
	}
	for range 10 {
		c := dialRaw(t, e.socket, "")
		wg.Go(func() {
			c.SetWriteDeadline(time.Now().Add(2 * time.Second))
			for i := range uint64(64) {
				c.Write(requestHeader(cmdRead, 0, i, 0, 32*mib)[:28])
			}
		})
	}
	other := dialRaw(t, e.socket, "")
	for i := range int64(20) {
		wantServes(t, other, 48*mib, i)
		time.Sleep(10 * time.Millisecond)
	}
	wg.Wait()
	wantServes(t, other, 48*mib, 99)
	// Also with requests of a size that guests use; the largest may have to
	// wait until one of the others has been thrown out.
	for _, n := range []uint32{65536, 128 * kib, mib} {
		begin := time.Now()
		other.want(0, cmdRead, 0, 48*mib, n, nil)
		other.want(0, cmdWrite, 0, 48*mib, n, make([]byte, n))
		if took := time.Since(begin); took > 18*time.Second {
			t.Errorf("a read and a write of %d bytes took %v", n, took)
		}
	}
	rss := residentKiB(t, e.pid)
	t.Logf("resident memory: %d MiB", rss/1024)
	if rss > (128+96)*1024 {
		t.Errorf("resident memory is %d MiB with --memory 128M", rss/1024)
	}
	e.inactivate()
	e.activate()
	wantServes(t, other, 48*mib, 100)
	e.kill()
}

// residentKiB is the memory a process holds, without what it maps of files.
func residentKiB(t testing.TB, pid int) int {
	t.Helper()
	m := regexp.MustCompile(`RssAnon:\s+(\d+) kB`).FindSubmatch(readFile(t, fmt.Sprintf("/proc/%d/status", pid)))
	if m == nil {
		t.Fatal("no RssAnon")
	}
	n, _ := strconv.Atoi(string(m[1]))
	return n
}

// inNamespace runs the command after a shell script in a mount namespace of
// its own, so that what the script mounts ends with the process.
func inNamespace(script string, args ...string) func(*exec.Cmd) {
	return func(c *exec.Cmd) {
		argv := []string{"unshare", "--mount"}
		if os.Getuid() != 0 {
			argv = append(argv, "--map-root-user")
		}
		argv = append(argv, "sh", "-ec", script+`; exec "$@"`, "sh")
		argv = append(argv, args...)
		c.Args = append(argv, c.Args...)
		c.Path, _ = lookPath("unshare")
	}
}

// A full file system is told to the client, and everything else goes on.
func TestDiskFull(t *testing.T) {
	dir := tmpfsDir(t)
	image := filepath.Join(dir, "small", "disk.img")
	e := servePrepared(t, image, inNamespace(
		`mkdir "$1/small"; mount -t tmpfs -o size=8m none "$1/small"; truncate -s 64M "$1/small/disk.img"; shift`, dir))
	inside := fmt.Sprintf("/proc/%d/root%s", e.pid, image)
	c, other := dialRaw(t, e.socket, ""), dialRaw(t, e.socket, "")
	var acked uint64
	for ; acked < 64; acked++ {
		rep := c.do(cmdWrite, 0, acked*mib, mib, randomBytes(int64(acked), mib))
		if rep.errno != 0 {
			if rep.errno != nbdENOSPC || rep.text == "" {
				t.Errorf("a write to a full file system: %s %q", errName(rep.errno), rep.text)
			}
			break
		}
	}
	if acked < 4 || acked > 8 {
		t.Fatalf("%d MiB were acknowledged on a file system of 8 MiB", acked)
	}
	for range 3 {
		c.want(nbdENOSPC, cmdWrite, 0, 32*mib, mib, make([]byte, mib))
		other.want(nbdENOSPC, cmdWrite, flagFUA, 33*mib, mib, make([]byte, mib))
		other.want(nbdENOSPC, cmdWriteZeroes, flagNoHole, 40*mib, 8*mib, nil)
	}
	other.want(0, cmdFlush, 0, 0, 0, nil)
	for i := range acked {
		sameBytes(t, "what was acknowledged", other.want(0, cmdRead, 0, i*mib, mib, nil).data, randomBytes(int64(i), mib))
	}
	// Reading a hole must take no space, though the file system has none left.
	sameBytes(t, "a hole", other.want(0, cmdRead, 0, 48*mib, 16*mib, nil).data, make([]byte, 16*mib))
	// Overwriting takes none, giving some back makes room.
	c.want(0, cmdWrite, 0, 0, mib, randomBytes(77, mib))
	c.want(0, cmdTrim, 0, 0, 2*mib, nil)
	c.want(0, cmdWrite, 0, 50*mib, mib, randomBytes(78, mib))
	q := e.qmp()
	for range 3 {
		q.must("blockdev-set-active", map[string]any{"active": false})
		q.must("blockdev-set-active", map[string]any{"active": true})
	}
	sameBytes(t, "the file", fileAt(t, inside, 50*mib, mib), randomBytes(78, mib))
}

// The file shrinking underneath is an error for what is gone, no more.
func TestImageShrinks(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, 32*mib)
		want := readFile(t, image)
		e := serve(t, image)
		c := dialRaw(t, e.socket, "")
		// Reads and writes are under way while it happens.
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var torn atomic.Int32 // connections on which a reply had begun when the rest of it went
		for i := range uint64(4) {
			busy := dialRaw(t, e.socket, "")
			busy.lost = func() { torn.Add(1) }
			wg.Go(func() {
				for n := uint64(0); ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					if rep := busy.do(cmdRead, 0, (i*8+n%8)*mib, mib, nil); rep.errno != 0 && rep.errno != nbdEIO {
						t.Errorf("a read while the file shrinks: %s", errName(rep.errno))
					}
					if rep := busy.do(cmdWrite, 0, i*4096, 4096, want[i*4096:i*4096+4096]); rep.errno != 0 {
						t.Errorf("a write to what is left: %s", errName(rep.errno))
					}
				}
			})
		}
		time.Sleep(50 * time.Millisecond)
		if err := os.Truncate(image, 16*mib); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		close(stop)
		wg.Wait()
		// That, and nothing else, ends a connection.
		e.log.wait(t, 0, "why each connection that is lost has ended", func(string) bool {
			told := 0
			for _, l := range e.log.lines() {
				if strings.Contains(l, "a read failed after its reply had begun") {
					told++
				}
			}
			return told == int(torn.Load())
		})
		for _, n := range []uint32{512, mib, 8 * mib} {
			c.want(nbdEIO, cmdRead, 0, 24*mib, n, nil)
			c.want(nbdEIO, cmdRead, flagDF, 24*mib, n, nil)
			c.want(nbdEIO, cmdRead, 0, 16*mib-256, n, nil)
			sameBytes(t, "what is left", c.want(0, cmdRead, 0, uint64(16*mib-n), n, nil).data, want[16*mib-n:16*mib])
		}
		c.do(cmdFlush, 0, 0, 0, nil) // here it is noticed at the latest
		for _, n := range []uint32{512, mib, 8 * mib} {
			c.want(nbdEIO, cmdWrite, 0, 24*mib, n, make([]byte, n))
			c.want(nbdEIO, cmdWrite, flagFUA, 16*mib-256, n, make([]byte, n))
			c.want(nbdEIO, cmdWriteZeroes, 0, 24*mib, n, nil)
			c.want(nbdEIO, cmdWriteZeroes, flagNoHole, 24*mib, n, nil)
			c.do(cmdTrim, 0, 24*mib, n, nil)
			c.do(cmdBlockStatus, 0, 24*mib, n, nil)
			c.do(cmdCache, 0, 24*mib, n, nil)
		}
		if size := snap(t, image).size; size != 16*mib {
			t.Errorf("the file was grown back to %d bytes", size)
		}
		wantServes(t, c, 8*mib, 1)
		sameBytes(t, "the file", fileAt(t, image, 0, 8*mib), want[:8*mib])
	})
}

// Without a FLUSH a smaller file is noticed within a second or so.
func TestShrinkIsNoticedByItself(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 1, 4*mib)
	e := serve(t, image)
	c := dialRaw(t, e.socket, "")
	if err := os.Truncate(image, mib); err != nil {
		t.Fatal(err)
	}
	e.log.wait(t, 0, "the file has shrunk", func(l string) bool { return strings.Contains(l, "has shrunk") })
	c.want(nbdEIO, cmdWrite, 0, 3*mib, 4096, make([]byte, 4096))
	if size := snap(t, image).size; size != mib {
		t.Errorf("the file was grown back to %d bytes", size)
	}
}

// Another owner may have changed the size; a connection keeps the one it was
// told, and what is not there any more is an error.
func TestSizeChangesWhileInactive(t *testing.T) {
	everyPlace(t, func(t *testing.T, dir string) {
		image := randomImage(t, dir, 1, 4*mib)
		e := serve(t, image)
		c := dialRaw(t, e.socket, "")
		e.inactivate()
		if err := os.Truncate(image, 2*mib); err != nil {
			t.Fatal(err)
		}
		c.do(cmdRead, 0, 3*mib, 4096, nil) // stale, gone: but no crash
		e.activate()
		c.want(nbdEINVAL, cmdRead, 0, 3*mib, 4096, nil)
		c.want(nbdEINVAL, cmdRead, 0, 2*mib-512, 4096, nil)
		c.want(nbdEINVAL, cmdTrim, 0, 3*mib, 4096, nil)
		c.want(nbdEINVAL, cmdBlockStatus, 0, 3*mib, 4096, nil)
		c.want(nbdENOSPC, cmdWrite, 0, 3*mib, 4096, make([]byte, 4096))
		c.want(nbdENOSPC, cmdWriteZeroes, 0, 3*mib, 4096, nil)
		wantServes(t, c, 2*mib-4096, 1)
		if d := dialRaw(t, e.socket, ""); d.size != 2*mib {
			t.Errorf("a new connection is told %d bytes", d.size)
		}
		if size := snap(t, image).size; size != 2*mib {
			t.Errorf("the file has %d bytes", size)
		}

		e.inactivate()
		if err := os.Truncate(image, 8*mib); err != nil {
			t.Fatal(err)
		}
		e.activate()
		wantServes(t, c, 4*mib-4096, 2)
		c.want(nbdEINVAL, cmdRead, 0, 4*mib, 4096, nil)
		c.want(nbdENOSPC, cmdWrite, 0, 4*mib, 4096, make([]byte, 4096))
		d := dialRaw(t, e.socket, "")
		if d.size != 8*mib {
			t.Errorf("a new connection is told %d bytes", d.size)
		}
		wantServes(t, d, 8*mib-4096, 3)
	})
}
