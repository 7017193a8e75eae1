package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// media are what an image may lie on and how it may be served.
func media(t *testing.T, f func(t *testing.T, image string, flags ...string)) {
	const size = 3 * mib
	for _, m := range []struct {
		name  string
		place string
		flags []string
	}{
		{"tmpfs", "tmpfs", nil},
		{"disk", "disk", nil},
		{"disk, O_DIRECT", "disk", []string{"--cache", "none"}},
		{"disk, writethrough", "disk", []string{"--cache", "writethrough"}},
	} {
		t.Run(m.name, func(t *testing.T) {
			f(t, randomImage(t, places[m.place](t), 1, size), m.flags...)
		})
	}
	// A size that no block divides: the last one is not whole.
	for _, flags := range [][]string{nil, {"--cache", "none"}} {
		t.Run(fmt.Sprint("odd size ", flags), func(t *testing.T) {
			f(t, randomImage(t, t.TempDir(), 1, size+4096+513), flags...)
		})
	}
	for _, flags := range [][]string{nil, {"--cache", "none"}} {
		t.Run(fmt.Sprint("block device ", flags), func(t *testing.T) {
			f(t, loopDevice(t, randomImage(t, t.TempDir(), 1, size)), flags...)
		})
	}
}

// loopDevice makes a block device of a file.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	if _, err := os.Stat("/dev/loop-control"); err != nil || os.Getuid() != 0 {
		t.Fatalf("cannot make a loop device (%v); run this as root, or do without with -skip %s", err, t.Name())
	}
	need(t, "losetup", "mount")
	device := strings.TrimSpace(run(t, "losetup", "--find", "--show", file))
	t.Cleanup(func() { tryRun(t, "losetup", "--detach", device) })
	return device
}

// Random requests against a model in memory, ownership going away and coming
// back in between.
func TestRandomRequestsAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	media(t, func(t *testing.T, image string, flags ...string) {
		e := serve(t, image, flags...)
		m := &model{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), bytes: readFile(t, image),
			conns: []*rawConn{dialRaw(t, e.socket, ""), dialRaw(t, e.socket, ""), dialSimple(t, e.socket, "")}}
		for i := range 1200 {
			m.step()
			if i%200 == 100 {
				m.conns[0].want(0, cmdFlush, 0, 0, 0, nil)
				e.inactivate()
				sameBytes(t, "the image after a handover", readFile(t, image), m.bytes)
				e.activate()
			}
			if t.Failed() {
				t.Fatalf("step %d", i)
			}
		}
		for _, c := range m.conns {
			c.Close()
		}
		e.stop()
		sameBytes(t, "the image", readFile(t, image), m.bytes)
	})
	t.Run("qemu-nbd", func(t *testing.T) {
		s := startTarget(t, "qemu-nbd", randomImage(t, tmpfsDir(t), 1, 3*mib), targetOptions{})
		m := &model{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), bytes: readFile(t, s.image),
			conns: []*rawConn{dialRaw(t, s.socket, ""), dialRaw(t, s.socket, ""), dialSimple(t, s.socket, "")}}
		for range 1200 {
			m.step()
		}
		sameBytes(t, "the image", readFile(t, s.image), m.bytes)
	})
}

// model is a part of a disk, from offset at on, that nobody else writes.
type model struct {
	t     testing.TB
	rnd   *rand.Rand
	at    int
	bytes []byte // more than a page
	conns []*rawConn
}

// step sends one request that must succeed, and follows it.
func (m *model) step() {
	m.t.Helper()
	r := m.rnd
	c := m.conns[r.IntN(len(m.conns))]
	var off, n int
	switch r.IntN(4) {
	case 0: // any bytes
		n = 1 + r.IntN(min(20000, len(m.bytes)-1))
		off = r.IntN(len(m.bytes) - n)
	case 1: // whole sectors
		n = 512 * (1 + r.IntN(min(64, len(m.bytes)/512-1)))
		off = 512 * r.IntN((len(m.bytes)-n)/512+1)
	case 2: // whole pages, up to a large request
		n = 4096 * (1 + r.IntN(min(256, len(m.bytes)/4096)))
		off = 4096 * r.IntN((len(m.bytes)-n)/4096+1)
	case 3: // up to the very end
		n = 1 + r.IntN(min(9000, len(m.bytes)-1))
		off = len(m.bytes) - n
	}
	at := m.at + off
	var flags uint16
	if r.IntN(8) == 0 {
		flags = flagFUA
	}
	here := m.bytes[off : off+n]
	switch p := r.IntN(100); {
	case p < 40:
		if c.structured && r.IntN(3) == 0 {
			flags |= flagDF
		}
		rep := c.want(0, cmdRead, flags, uint64(at), uint32(n), nil)
		if flags&flagDF != 0 && rep.chunks != 1 {
			m.t.Errorf("%d chunks with DF", rep.chunks)
		}
		sameBytes(m.t, fmt.Sprintf("read of %d+%d", at, n), rep.data, here)
	case p < 70:
		for i := range here {
			here[i] = byte(r.Uint32())
		}
		c.want(0, cmdWrite, flags, uint64(at), uint32(n), here)
	case p < 80:
		if r.IntN(2) == 0 {
			flags |= flagNoHole
		}
		c.want(0, cmdWriteZeroes, flags, uint64(at), uint32(n), nil)
		clear(here)
	case p < 85:
		flags |= flagFastZero
		if rep := c.do(cmdWriteZeroes, flags, uint64(at), uint32(n), nil); rep.errno == 0 {
			clear(here)
		} else if rep.errno != nbdENOTSUP {
			m.t.Errorf("FAST_ZERO: %s %q", errName(rep.errno), rep.text)
		}
	case p < 90:
		c.want(0, cmdTrim, flags, uint64(at), uint32(n), nil)
		// Each byte is what it was, or zero; from now on that.
		now := c.want(0, cmdRead, 0, uint64(at), uint32(n), nil).data
		for i := range here {
			if now[i] != here[i] && now[i] != 0 {
				m.t.Fatalf("TRIM of %d+%d made byte %d %#x, it was %#x", at, n, at+i, now[i], here[i])
			}
		}
		copy(here, now)
	case p < 95:
		if !c.structured {
			return
		}
		next := off
		for _, x := range c.want(0, cmdBlockStatus, flags, uint64(at), uint32(n), nil).extents {
			if x.length == 0 {
				m.t.Fatal("an extent without length")
			}
			end := min(next+int(x.length), len(m.bytes))
			if x.flags&2 != 0 && bytes.Count(m.bytes[next:end], []byte{0}) != end-next {
				m.t.Errorf("%d+%d is said to read as zeroes", m.at+next, x.length)
			}
			next = end
		}
	case p < 98:
		c.want(0, cmdCache, flags, uint64(at), uint32(n), nil)
	default:
		c.want(0, cmdFlush, 0, 0, 0, nil)
	}
}

// Neighbours that share a block or a page, written over several connections at
// once, do not undo each other.
func TestNeighboursInOneBlock(t *testing.T) {
	media(t, func(t *testing.T, image string, flags ...string) {
		const conns, part, rounds = 8, 100, 40 // 800 bytes: over a sector's edge
		e := serve(t, image, flags...)
		want := readFile(t, image)
		var wg sync.WaitGroup
		for i := range conns {
			c := dialRaw(t, e.socket, "")
			wg.Go(func() {
				for r := range rounds {
					off := r*4096 + 3900 + i*part // over a page's edge, too
					b := bytes.Repeat([]byte{byte(1 + i*rounds + r)}, part)
					copy(want[off:], b)
					c.want(0, cmdWrite, 0, uint64(off), part, b)
				}
				c.Close()
			})
		}
		wg.Wait()
		c := dialRaw(t, e.socket, "")
		sameBytes(t, "read back", c.want(0, cmdRead, 0, 0, uint32(len(want)), nil).data, want)
		c.Close()
		e.stop()
		sameBytes(t, "the image", readFile(t, image), want)
	})
}

// A write is seen, and made durable, through every other connection.
func TestConnectionsSeeEachOther(t *testing.T) {
	media(t, func(t *testing.T, image string, flags ...string) {
		e := serve(t, image, flags...)
		a, b := dialRaw(t, e.socket, ""), dialSimple(t, e.socket, "")
		if a.flags&(1<<8) == 0 {
			t.Error("CAN_MULTI_CONN is not advertised")
		}
		for i := range int64(50) {
			data := randomBytes(i, 4096)
			a.want(0, cmdWrite, 0, uint64(1000*i), 4096, data)
			sameBytes(t, "the other connection's read", b.want(0, cmdRead, 0, uint64(1000*i), 4096, nil).data, data)
			b.want(0, cmdFlush, 0, 0, 0, nil)
			a, b = b, a
		}
	})
}

// Requests that may be anything get an answer that the protocol knows, and
// touch no byte when they are refused.
func TestRandomGarbageRequests(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	image := randomImage(t, tmpfsDir(t), 1, mib)
	e := serve(t, image, "--inactive")
	before := snap(t, image)
	rnd := rand.New(rand.NewPCG(seed, 2))
	some := func(values ...uint64) uint64 { return values[rnd.IntN(len(values))] }
	for range 20 {
		c := dialRaw(t, e.socket, "")
		for range 100 {
			cmd := uint16(some(0, 1, 3, 4, 5, 6, 7, 8, 9, 255, rnd.Uint64()))
			if cmd == cmdDisc {
				continue
			}
			flags := uint16(some(0, 0, 1, 2, 4, 8, 16, rnd.Uint64()))
			off := some(0, 512, mib-1, mib, mib+1, 1<<63-1, 1<<63, 1<<64-1, rnd.Uint64())
			length := uint32(some(0, 1, 512, 65536, mib, mib+1, rnd.Uint64()%(32*mib)))
			var payload []byte
			if cmd == cmdWrite {
				payload = make([]byte, length)
			}
			rep := c.do(cmd, flags, off, length, payload)
			if errName(rep.errno) == fmt.Sprint(rep.errno) && rep.errno != 0 {
				t.Errorf("command %d, flags %#x, %d+%d: error %d is none of the protocol's", cmd, flags, off, length, rep.errno)
			}
			if rep.errno == 0 && cmd != cmdRead && cmd != cmdFlush && length != 0 {
				t.Errorf("command %d, flags %#x, %d+%d succeeded on an inactive export", cmd, flags, off, length)
			}
		}
		c.want(0, cmdRead, 0, 0, 512, nil)
		c.Close()
	}
	sameSnap(t, image, before)
}

// The handshake does not tell the state, since the state changes.
func TestHandshakeIsTheSameInEveryState(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib), "-x", "disk", "-D", "text")
	info := func() string {
		c := dialNBD(t, "unix", e.socket)
		c.clientFlags(3)
		list := c.mustOption(optList, nil)
		c.mustOption(optStructured, nil)
		meta := c.mustOption(optSetMeta, metaQuery("disk", "base:allocation"))
		return fmt.Sprint(list, meta, c.mustOption(optInfo, goQuery("disk", 0, 1, 2, 3)), c.mustOption(optGo, goQuery("disk", 0, 1, 2, 3)))
	}
	active := info()
	e.inactivate()
	if inactive := info(); inactive != active {
		t.Errorf("handshake while active:\n%s\nwhile inactive:\n%s", active, inactive)
	}
}

// Nothing is thrown away of an image that has not failed.
func TestAbandonOfHealthyImageLosesNothing(t *testing.T) {
	e := serve(t, sparseImage(t, tmpfsDir(t), mib))
	wantServes(t, dialRaw(t, e.socket, ""), 0, 1)
	run(t, program(t), "inactivate", "--abandon", "--control", e.control)
	wantStatus(t, e, "inactive", 1)
	wantLocks(t, e.image, nil)
	sameBytes(t, "the image", fileAt(t, e.image, 0, 4096), randomBytes(1, 4096))
}

// The image itself may be named in any way.
func TestImageNames(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"with space", "-dash", "ünï", "new\nline", `quo"te`, "fmt%s%d", "a:b"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, mib), 0o600); err != nil {
			t.Fatal(err)
		}
		e := serve(t, path)
		c := dialRaw(t, e.socket, "")
		wantServes(t, c, 0, 1)
		c.Close()
		if s := e.status(); s.Image != path {
			t.Errorf("status calls %q %q", path, s.Image)
		}
		e.stop()
		r := cli(t, "serve", "-f", "raw", "-k", shortDir(t)+"/nbd", path+".none")
		if r.code != 1 || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%q: exit status %d, %s", name, r.code, r.stderr)
		}
	}
}
