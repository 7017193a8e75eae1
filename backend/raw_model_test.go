package backend

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// Two exporters of one image against a slice of bytes: whatever is done
// through whichever owns it, all readers see the same.
func TestModel(t *testing.T) {
	checks := flag.Lookup("rapid.checks")
	onEach(t, func(t *testing.T, dir string) {
		if asked := checks.Value.String(); asked == checks.DefValue && !testfs.InMemory(t, dir) {
			checks.Value.Set("25") // a disk takes its time to sync
			defer checks.Value.Set(asked)
		}
		n := 0
		rapid.Check(t, func(rt *rapid.T) {
			n++
			size := rapid.Int64Range(1, 400<<10).Draw(rt, "size")
			cache := rapid.SampledFrom([]CacheMode{CacheWriteback, CacheNone, CacheWritethrough}).Draw(rt, "cache")
			path := filepath.Join(dir, fmt.Sprint(n))
			if err := os.WriteFile(path, pattern(int(size), 1), 0o600); err != nil {
				rt.Fatal(err)
			}
			defer os.Remove(path)
			shadow := pattern(int(size), 1)

			var images [2]*Owned
			for i := range images {
				r, err := Open(Options{Path: path, Format: "raw", Cache: cache})
				if cache == CacheNone && isErrno(err, unix.EINVAL) && testfs.InMemory(t, dir) {
					rt.Skip() // as skipWithoutDirect
				}
				if err != nil {
					rt.Fatal(err)
				}
				defer r.Close()
				images[i] = r
			}
			owner := images[0]
			ok := func(err error) {
				if err != nil {
					rt.Fatalf("%v", err)
				}
			}
			ok(activate(owner, false))
			ranged := func(rt *rapid.T) (off, n int64) {
				off = rapid.Int64Range(0, size-1).Draw(rt, "off")
				return off, rapid.Int64Range(1, size-off).Draw(rt, "n")
			}
			compare := func(rt *rapid.T, r *Owned, off, n int64) {
				got := make([]byte, n)
				if err := read(r, off, got); err != nil {
					rt.Fatal(err)
				}
				if !bytes.Equal(got, shadow[off:off+n]) {
					rt.Fatalf("%d+%d differs", off, n)
				}
			}
			rt.Repeat(map[string]func(*rapid.T){
				"write": func(rt *rapid.T) {
					off, n := ranged(rt)
					b := pattern(int(n), rapid.Uint64().Draw(rt, "seed"))
					ok(write(owner, off, b, rapid.Bool().Draw(rt, "fua")))
					copy(shadow[off:], b)
				},
				"zero": func(rt *rapid.T) {
					off, n := ranged(rt)
					flags := ZeroFlags(rapid.IntRange(0, 3).Draw(rt, "flags"))
					if err := owner.Zero(off, n, flags); err == nil {
						clear(shadow[off : off+n])
					} else if flags&FastZero == 0 || !isErrno(err, unix.EOPNOTSUPP) {
						rt.Fatal(err)
					}
				},
				"discard": func(rt *rapid.T) {
					off, n := ranged(rt)
					ok(owner.Discard(off, n))
					got := make([]byte, n)
					ok(read(owner, off, got))
					if !bytes.Equal(got, make([]byte, n)) && !bytes.Equal(got, shadow[off:off+n]) {
						rt.Fatal("neither zeros nor as before")
					}
					copy(shadow[off:], got)
				},
				"read": func(rt *rapid.T) {
					off, n := ranged(rt)
					compare(rt, owner, off, n)
				},
				"status": func(rt *rapid.T) {
					off, n := ranged(rt)
					ext, err := owner.Status(nil, off, n, 1<<20)
					ok(err)
					at := off
					for _, e := range ext {
						if e.Flags&StatusZero != 0 && len(bytes.Trim(shadow[at:at+e.Length], "\x00")) != 0 {
							rt.Fatalf("%d+%d does not read as zeros", at, e.Length)
						}
						at += e.Length
					}
					if at != off+n {
						rt.Fatalf("covers %d of %d", at-off, n)
					}
				},
				"flush": func(rt *rapid.T) { ok(owner.Flush()) },
				"handover": func(rt *rapid.T) {
					ok(inactivate(owner))
					if rapid.Bool().Draw(rt, "back") {
						ok(activate(owner, true))
						return
					}
					owner, images[0], images[1] = images[1], images[1], images[0]
					ok(activate(owner, false))
				},
				"": func(rt *rapid.T) {
					if owner.Size() != size {
						rt.Fatal("the size is ", owner.Size())
					}
				},
			})
			compare(rt, owner, 0, size)
			ok(inactivate(owner))
			if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, shadow) {
				rt.Fatal("the file differs: ", err)
			}
		})
	})
}
