package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/backend/qcow2/memfile"
)

// failing are images whose every kind of table changes in a short history.
var failing = map[string]func(t *testing.T) *memfile.File{
	"new tables": func(t *testing.T) *memfile.File { return made(t, "200k", "cluster_size=512") },
	// A few clusters more, and the refcount table has to become larger.
	"refcount table": func(t *testing.T) *memfile.File {
		f := made(t, "2304k", "cluster_size=512", "refcount_bits=64")
		im := opened(t, f, Options{})
		im.alloc.least = 0
		if err := im.Begin(nil); err != nil {
			t.Fatal(err)
		}
		for off := int64(0); im.alloc.end+4 < int64(len(im.refs.table))*im.g.refcountsPerBlock(); off += 512 {
			if err := im.writeAt(bytes.Repeat([]byte{1}, 512), off); err != nil {
				t.Fatal(err)
			}
		}
		if err := im.Settle(); err != nil {
			t.Fatal(err)
		}
		im.Close()
		return f
	},
	"extended": func(t *testing.T) *memfile.File { return made(t, "200k", "cluster_size=16k", "extended_l2=on") },
	"snapshot, compressed": func(t *testing.T) *memfile.File {
		path := filepath.Join(t.TempDir(), "f.qcow2")
		raw := path + ".raw"
		if err := os.WriteFile(raw, bytes.Repeat([]byte("0123456789abcdef"), 200<<10/16), 0o600); err != nil {
			t.Fatal(err)
		}
		qemuImg(t, "convert", "-c", "-O", "qcow2", "-o", "cluster_size=1k", raw, path)
		qemuImg(t, "snapshot", "-c", "s", path)
		return loaded(t, path)
	},
}

// story does the same on every call: Begin, writes, zeros, discards, flushes,
// and in the end Settle. What fails is done again, once: only one call fails.
func story(t *testing.T, im *Image, shadow []byte) (failures int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(5, 5))
	again := func(what string, do func() error) {
		t.Helper()
		if err := do(); err != nil {
			failures++
			if err := do(); err != nil {
				t.Fatalf("%s fails again: %v", what, err)
			}
		}
	}
	again("begin", func() error { return im.Begin(nil) })
	cluster := im.g.ClusterSize()
	// Where nothing is yet, in the large one.
	p := noise(rng, min(16*cluster, im.Size()/2))
	last := im.Size() - int64(len(p))
	again("write", func() error { return im.writeAt(p, last) })
	copy(shadow[last:], p)
	again("flush", im.Flush)
	for range 30 {
		off := rng.Int64N(im.Size() - cluster)
		n := 1 + rng.Int64N(min(im.Size()-off, 3*cluster))
		switch rng.IntN(6) {
		case 0:
			again("zero", func() error { return im.Zero(off, n, false) })
			clear(shadow[off : off+n])
		case 1:
			off &^= cluster - 1
			n = min(4*cluster, im.Size()-off) &^ (cluster - 1)
			again("discard", func() error { return im.Discard(off, n) })
			clear(shadow[off : off+n])
		case 2:
			again("flush", im.Flush)
		default:
			p := noise(rng, n)
			again("write", func() error { return im.writeAt(p, off) })
			copy(shadow[off:], p)
		}
	}
	again("settle", im.Settle)
	return failures
}

// TestEveryFailedCallCanBeDoneAgain has each call that changes the file fail in
// its turn, with an error that a full disk or a bad sector gives. Nothing is
// lost, nothing is leaked, and whoever opens the image then finds it whole.
func TestEveryFailedCallCanBeDoneAgain(t *testing.T) {
	for name, open := range failing {
		t.Run(name, func(t *testing.T) {
			calls := 0
			for fails := 1; ; fails += stride {
				f := open(t)
				im := opened(t, f, Options{L2Cache: 1, Warn: func(string) {}})
				im.alloc.least = 0
				shadow := readAll(t, im)
				calls = 0
				var failed string
				f.Fail = func(op memfile.Op, off, n int64) error {
					if op == memfile.Sync {
						return nil
					}
					if calls++; calls != fails {
						return nil
					}
					failed = fmt.Sprintf("call %d, op %d at %#x+%d", fails, op, off, n)
					return []unix.Errno{unix.ENOSPC, unix.EIO}[fails%2]
				}
				story(t, im, shadow)
				if i := differs(readAll(t, im), shadow); i >= 0 {
					t.Fatalf("%s: the disk differs at %d", failed, i)
				}
				im.Close()
				f.Fail = nil
				if i := differs(readAll(t, opened(t, f, Options{})), shadow); i >= 0 {
					t.Fatalf("%s: opened anew the disk differs at %d", failed, i)
				}
				r, err := Check(f, im.h, nil)
				if err != nil || !r.Clean() {
					t.Fatalf("%s: %v %+v", failed, err, r)
				}
				if h, err := ReadHeader(f); err != nil || name == "refcount table" && h.RefcountLength == 1 {
					t.Fatalf("the refcount table has not become larger: %v", err)
				}
				if calls < fails {
					break // each has failed once
				}
			}
			t.Logf("%d calls", calls)
		})
	}
}

// TestFailedReadsOfTables has each read fail in its turn.
func TestFailedReadsOfTables(t *testing.T) {
	for name, open := range failing {
		t.Run(name, func(t *testing.T) {
			for fails := 1; ; fails += stride {
				f := open(t)
				im := opened(t, f, Options{L2Cache: 1, Warn: func(string) {}})
				im.alloc.least = 0
				shadow := readAll(t, im)
				reads := 0
				f.FailRead = func(off, n int64) error {
					if reads++; reads == fails {
						return unix.EIO
					}
					return nil
				}
				story(t, im, shadow)
				f.FailRead = nil
				if i := differs(readAll(t, im), shadow); i >= 0 {
					t.Fatalf("read %d failed: the disk differs at %d", fails, i)
				}
				im.Close()
				r, err := Check(f, im.h, nil)
				if err != nil || !r.Clean() {
					t.Fatalf("read %d failed: %v %+v", fails, err, r)
				}
				if reads < fails {
					return
				}
			}
		})
	}
}

// TestReadsWhereTablesCannotBeWritten: the disk is full, or a sync has failed for
// ever, while more tables wait to be written than the cache likes. What they name
// is read all the same, and written where it is; no more tables are changed.
func TestReadsWhereTablesCannotBeWritten(t *testing.T) {
	const cluster, covered = 512, 512 / 8 * 512
	f := memfile.New("image", nil)
	if err := Create(f, nil, CreateOptions{Size: 100 * covered, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	im := begun(t, f, Options{L2Cache: 10 * cluster, Warn: func(string) {}})
	p := bytes.Repeat([]byte{7}, cluster)
	at := func(table int64) int64 { return table*covered + 3*cluster }
	for table := range int64(100) {
		if err := im.writeAt(p, at(table)); err != nil {
			t.Fatal(err)
		}
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, broken := range []memfile.Op{memfile.Write, memfile.Sync} {
		f.Fail = func(op memfile.Op, off, n int64) error {
			if op == broken && n != cluster-1 { // which is how the guest writes
				return unix.ENOSPC
			}
			return nil
		}
		var err error
		for table := int64(0); table < 100 && err == nil; table++ {
			err = im.writeAt(p[1:], at(table)+2*cluster) // to a new cluster
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("writes: %v", err)
		}
		for table := range int64(100) {
			got := make([]byte, cluster)
			if err := im.readAt(got, at(table)); err != nil || !bytes.Equal(got, p) {
				t.Fatalf("table %d: %v, or it reads other bytes", table, err)
			}
			if broken == memfile.Write {
				if err := im.writeAt(p[1:], at(table)); err != nil {
					t.Fatalf("table %d: what has its place already: %v", table, err)
				}
			}
		}
		f.Fail = nil
		if broken == memfile.Write {
			if err := im.Settle(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestFailedSync has each sync fail for ever in its turn: nothing is durable
// from then on, no call says that it is, and the file is as a crash leaves it.
func TestFailedSync(t *testing.T) {
	for name, open := range failing {
		t.Run(name, func(t *testing.T) {
			for fails := 1; ; fails += stride {
				f := open(t)
				im := opened(t, f, Options{Warn: func(string) {}})
				im.alloc.least = 0
				shadow := readAll(t, im)
				if err := im.Begin(nil); err != nil {
					t.Fatal(err)
				}
				syncs := 0
				f.Fail = func(op memfile.Op, off, n int64) error {
					if op == memfile.Sync {
						if syncs++; syncs == fails {
							return unix.EIO
						}
					}
					return nil
				}
				rng := rand.New(rand.NewPCG(6, 6))
				var err error
				for range 20 {
					p := noise(rng, 1+rng.Int64N(2000))
					off := rng.Int64N(im.Size() - 2000)
					if werr := im.writeAt(p, off); werr == nil {
						copy(shadow[off:], p)
					}
					if rng.IntN(4) == 0 {
						if ferr := im.Flush(); ferr != nil {
							err = ferr
						} else if err != nil {
							t.Fatalf("sync %d failed, and a later flush says it is durable", fails)
						}
					}
				}
				serr := im.Settle()
				if syncs >= fails && serr == nil {
					t.Fatalf("sync %d failed, and Settle says all is durable", fails)
				}
				f.Fail = nil
				if i := differs(readAll(t, im), shadow); i >= 0 {
					t.Fatalf("sync %d failed: the disk differs at %d", fails, i)
				}
				im.Close()
				r, cerr := Check(f, im.h, nil)
				if cerr != nil || r.Corruptions > 0 {
					t.Fatalf("sync %d failed: %v %+v", fails, cerr, r)
				}
				if syncs < fails {
					return
				}
			}
		})
	}
}

// TestClosedWithWritesFails: whoever is fenced closes the image beside requests.
// What was not written is lost then, and nobody is told that it is durable.
func TestClosedWithWritesFails(t *testing.T) {
	f := made(t, "1M", "cluster_size=4k")
	im := begun(t, f, Options{})
	p := bytes.Repeat([]byte{7}, 4096)
	if err := im.writeAt(p, 0); err != nil {
		t.Fatal(err)
	}
	before := f.Bytes()
	im.Close()
	for what, do := range map[string]func() error{
		"flush":   im.Flush,
		"settle":  im.Settle,
		"write":   func() error { return im.writeAt(p, 8192) },
		"discard": func() error { return im.Discard(0, 4096) },
	} {
		if err := do(); !errors.Is(err, unix.EIO) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := im.readAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(f.Bytes(), before) {
		t.Error("a closed image has changed")
	}
}

// TestWriteBackTellsOnce: a disk that stays full is told of when it becomes so, and
// not with each write-back.
func TestWriteBackTellsOnce(t *testing.T) {
	f := made(t, "1M", "cluster_size=4k")
	told := 0
	im := begun(t, f, Options{Warn: func(string) { told++ }})
	p := make([]byte, 4096)
	full := func(memfile.Op, int64, int64) error { return unix.ENOSPC }
	for want := 1; want <= 2; want++ {
		if err := im.writeAt(p, int64(want)<<16); err != nil {
			t.Fatal(err)
		}
		f.Fail = full
		for range 3 {
			im.writeBackNow()
		}
		f.Fail = nil
		if told != want {
			t.Errorf("told %d times, want %d", told, want)
		}
		im.writeBackNow()
	}
}
