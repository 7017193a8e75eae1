package backend

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// qemuImg runs qemu-img, which "make peers" installs.
func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img %s: %v\n%s(package qemu-utils)", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// makeQcow makes an image with qemu-img; args end with its size, if it has one
// of its own.
func makeQcow(t testing.TB, dir string, args ...string) string {
	t.Helper()
	path := filepath.Join(dir, "disk.qcow2")
	qemuImg(t, slices.Concat([]string{"create", "-q", "-f", "qcow2"}, args[:len(args)-1], []string{path}, args[len(args)-1:])...)
	return path
}

func checkQcow(t testing.TB, path string) {
	t.Helper()
	qemuImg(t, "check", "-q", "-f", "qcow2", path)
}

// checkLeaks is checkQcow of an image whose owner died.
func checkLeaks(t testing.TB, path string) {
	t.Helper()
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	if e, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || e.ExitCode() != 3) {
		t.Fatalf("%v\n%s", err, out)
	}
}

func sumOf(t testing.TB, path string) [32]byte {
	t.Helper()
	return sha256.Sum256(contentOf(t, path))
}

// wantDisk reads the whole image and compares.
func wantDisk(t testing.TB, o *Owned, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	must(t, read(o, 0, got))
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Fatalf("first difference at %d", i)
	}
}

// An image goes from owner to owner, with all they wrote, and holds locks as a
// raw one does.
func TestQcowChangesOwner(t *testing.T) {
	for name, args := range map[string][]string{
		"plain":     {"8M"},
		"v2":        {"-o", "compat=0.10", "8M"},
		"small":     {"-o", "cluster_size=512,refcount_bits=1", "8M"},
		"extended":  {"-o", "extended_l2=on", "8M"},
		"data file": {"-o", "data_file=DATA", "8M"},
		"raw data":  {"-o", "data_file=DATA,data_file_raw=on", "8M"},
		"odd size":  {"-o", "cluster_size=2M", "8388096"},
	} {
		for _, cache := range []CacheMode{CacheWriteback, CacheNone} {
			t.Run(name+" "+string(cache), func(t *testing.T) {
				onEach(t, func(t *testing.T, dir string) {
					args := slices.Clone(args)
					for i := range args {
						args[i] = strings.ReplaceAll(args[i], "DATA", filepath.Join(dir, "data"))
					}
					path := makeQcow(t, dir, args...)
					a := openImage(t, Options{Path: path, Format: "qcow2", Cache: cache}, nil)
					b := openImage(t, Options{Path: path, Format: "qcow2", Cache: cache}, nil)
					want := make([]byte, a.Size())
					for round := range 6 {
						owner, other := a, b
						if round%2 == 1 {
							owner, other = b, a
						}
						must(t, activate(owner, false))
						wantDisk(t, owner, want)
						if got := owner.LocksHeld(); got != "100,101,103,201,203" {
							t.Errorf("locks %s", got)
						}
						var le *LockError
						if err := activate(other, false); !errors.As(err, &le) {
							t.Errorf("two owners: %v", err)
						}
						for i := range 20 {
							off := int64((round*1000003 + i*700001) % (len(want) - 70000))
							p := pattern(1+i*3000, uint64(round*100+i))
							must(t, write(owner, off, p, i%7 == 0))
							copy(want[off:], p)
						}
						must(t, owner.Discard(int64(round)<<20, 0x20000))
						must(t, owner.Zero(int64(round)<<20, 0x20000, 0))
						clear(want[round<<20:][:0x20000])
						wantDisk(t, owner, want)
						must(t, inactivate(owner))
						wantDisk(t, owner, want)
						if l := procLocks(t, path); len(l) != 0 {
							t.Errorf("locks left: %v", l)
						}
						if _, w := descriptors(t, path); w != 0 {
							t.Errorf("%d writable descriptors left", w)
						}
						checkQcow(t, path)
						wantErrno(t, write(owner, 0, []byte{1}, false), unix.EPERM)
					}
					raw := filepath.Join(dir, "raw")
					qemuImg(t, "convert", "-f", "qcow2", "-O", "raw", path, raw)
					wantContent(t, raw, want)
				})
			})
		}
	}
}

// What is inactive changes no byte, whatever state the image is in.
func TestQcowInactiveWritesNothing(t *testing.T) {
	dirty := func(t *testing.T, path string) {
		// As after the death of an owner with lazy refcounts: the dirty bit is
		// the last of the first incompatible features.
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		must(t, err)
		_, err = f.WriteAt([]byte{1}, 79)
		must(t, errors.Join(err, f.Close()))
	}
	for name, make := range map[string]func(t *testing.T, path string){
		"clean": func(t *testing.T, path string) {},
		"dirty": dirty,
		"bitmap": func(t *testing.T, path string) {
			qemuImg(t, "bitmap", "--add", path, "b0")
		},
		"leaks": func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
			must(t, err)
			_, err = f.Write(pattern(128<<10, 1))
			must(t, errors.Join(err, f.Close()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := makeQcow(t, t.TempDir(), "-o", "lazy_refcounts=on", "8M")
			make(t, path)
			was := sumOf(t, path)
			o := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
			must(t, read(o, 0, pattern(1<<20, 0)))
			must(t, o.Flush())
			o.Identify()
			must(t, o.Close())
			if sumOf(t, path) != was {
				t.Error("an image that was only open inactive has changed")
			}
			o = openImage(t, Options{Path: path, Format: "qcow2"}, nil)
			must(t, activate(o, false))
			must(t, write(o, 1<<20, pattern(1<<20, 1), false))
			must(t, inactivate(o))
			was = sumOf(t, path)
			must(t, read(o, 0, pattern(1<<20, 0)))
			must(t, o.Flush())
			must(t, o.Close())
			if sumOf(t, path) != was {
				t.Error("an image that was inactivated has changed")
			}
			checkQcow(t, path)
		})
	}
}

// A dirty image is repaired by its next owner, or refused if that is not
// wanted.
func TestQcowRepairOnActivate(t *testing.T) {
	path := makeQcow(t, t.TempDir(), "-o", "lazy_refcounts=on", "8M")
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte{1}, 79)
	must(t, errors.Join(err, f.Close()))
	was := sumOf(t, path)
	o := openImage(t, Options{Path: path, Format: "qcow2", NoRepair: true}, nil)
	if err := activate(o, false); err == nil || !strings.Contains(err.Error(), "nbd-export check --repair all") {
		t.Error(err)
	}
	if sumOf(t, path) != was || o.LocksHeld() != "none" {
		t.Error("a refused activation left something")
	}
	o = openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	must(t, activate(o, false))
	must(t, inactivate(o))
	checkQcow(t, path)
}

// --if-unchanged sees that another owner was there.
func TestQcowIfUnchanged(t *testing.T) {
	path := makeQcow(t, t.TempDir(), "1G")
	a := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	b := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	must(t, activate(a, true))
	must(t, write(a, 0, pattern(100, 1), false))
	must(t, inactivate(a))
	must(t, activate(a, true))
	must(t, inactivate(a))
	must(t, activate(b, false))
	must(t, write(b, 700<<20, pattern(100, 1), false)) // by another L2 table
	must(t, inactivate(b))
	var modified *ModifiedError
	if err := activate(a, true); !errors.As(err, &modified) || !strings.Contains(modified.What, "tables") {
		t.Error(err)
	}
	must(t, activate(a, false))
}

// Whatever write or sync of an inactivation fails: after a write the image is
// active still, and can be inactivated; after a sync it is lost. What is on
// disk is consistent at every point.
func TestQcowInactivationFails(t *testing.T) {
	for _, op := range []sysop{opWrite, opSync, opTruncate, opPunch} {
		for at := 1; ; at++ {
			path := makeQcow(t, testfs.Memory(t), "-o", "cluster_size=4k", "8M")
			var mu sync.Mutex
			left := -1
			o := openImage(t, Options{Path: path, Format: "qcow2"}, func(call sysop, _ int64, n int) (int, error) {
				mu.Lock()
				defer mu.Unlock()
				if call != op || left < 0 {
					return n, nil
				}
				if left--; left == 0 {
					return 0, unix.EIO
				}
				return n, nil
			})
			must(t, activate(o, false))
			want := make([]byte, o.Size())
			copy(want[1<<20:], pattern(1<<20, 1))
			must(t, write(o, 1<<20, want[1<<20:2<<20], false))
			must(t, o.Flush())
			must(t, o.Discard(1<<20, 1<<19))
			clear(want[1<<20:][:1<<19])
			must(t, write(o, 3<<20, pattern(1<<18, 2), false))
			copy(want[3<<20:], pattern(1<<18, 2))
			mu.Lock()
			left = at
			mu.Unlock()
			err := inactivate(o)
			mu.Lock()
			failed := left == 0
			left = -1
			mu.Unlock()
			if !failed {
				must(t, err)
				if at == 1 && op != opPunch {
					t.Errorf("no %v in an inactivation", op)
				}
				break
			}
			t.Logf("%v %d: %v", op, at, err)
			if (op == opSync) != SyncFailed(err) && err != nil {
				t.Errorf("%v %d: %v", op, at, err)
			}
			if op == opSync {
				if err == nil {
					t.Errorf("sync %d: no error", at)
				}
				must(t, o.Abandon())
				o.PublishInactive()
				must(t, o.Release())
				checkLeaks(t, path)
				continue
			}
			if err != nil {
				if o.LocksHeld() == "none" {
					t.Errorf("%v %d: no locks", op, at)
				}
				wantDisk(t, o, want)
				must(t, write(o, 5<<20, pattern(5000, 3), false))
				copy(want[5<<20:], pattern(5000, 3))
				must(t, inactivate(o))
			}
			wantDisk(t, o, want)
			checkQcow(t, path)
		}
	}
}

// What needs no new cluster allocates no memory.
func TestQcowNoAllocations(t *testing.T) {
	o := openImage(t, Options{Path: makeQcow(t, testfs.Memory(t), "64M"), Format: "qcow2"}, nil)
	must(t, activate(o, false))
	b := pattern(256<<10, 1)
	must(t, write(o, 0, b, false))
	must(t, o.Flush())
	var p Plan
	for name, fn := range map[string]func(){
		"Map":     func() { o.Map(&p, 4096, 4096, 0); o.Unmap(&p) },
		"large":   func() { o.Map(&p, 0, 1<<20, FindHoles); o.Unmap(&p) },
		"Prepare": func() { o.Prepare(&p, 4096, b[:4096], 0); o.Commit(&p) },
		"Abort":   func() { o.Prepare(&p, 4096, b[:4096], 0); o.Abort(&p) },
		"Recycle": func() { o.Map(&p, 4096, 4096, 0); o.Unmap(&p); p.Recycle() },
	} {
		if n := testing.AllocsPerRun(50, fn); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

func BenchmarkQcowMap(b *testing.B) {
	o, err := Open(Options{Path: makeQcow(b, testfs.Memory(b), "64M"), Format: "qcow2"})
	must(b, err)
	defer o.Close()
	must(b, activate(o, false))
	payload := make([]byte, 4096)
	must(b, write(o, 0, make([]byte, 1<<20), false))
	must(b, o.Flush())
	var p Plan
	b.Run("map", func(b *testing.B) {
		for b.Loop() {
			if err := o.Map(&p, 4096, 4096, 0); err != nil {
				b.Fatal(err)
			}
			o.Unmap(&p)
		}
	})
	b.Run("prepare", func(b *testing.B) {
		for b.Loop() {
			if err := o.Prepare(&p, 4096, payload, 0); err != nil {
				b.Fatal(err)
			}
			o.Commit(&p)
		}
	})
}

// An owner whose locks are gone is fenced, and giving the image up writes none of
// its tables.
func TestQcowFenced(t *testing.T) {
	path := makeQcow(t, t.TempDir(), "8M")
	o := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	must(t, activate(o, false))
	must(t, write(o, 0, pattern(1<<20, 1), false))
	must(t, o.Check())
	dropLock(t, o.cur.Load().file.fd, 201)
	var fenced *FencedError
	if err := o.Check(); !errors.As(err, &fenced) {
		t.Fatal(err)
	}
	wantErrno(t, write(o, 2<<20, []byte{1}, false), unix.EIO)
	wantErrno(t, o.Flush(), unix.EIO)
	wantErrno(t, o.Settle(), unix.EIO)
	was := sumOf(t, path)
	must(t, o.Abandon())
	o.PublishInactive()
	must(t, o.Release())
	if sumOf(t, path) != was {
		t.Error("what was abandoned was written")
	}
	checkLeaks(t, path)
}

// Fresh is what a write finds a new cluster for, and no write after that.
func TestQcowFresh(t *testing.T) {
	o := openImage(t, Options{Path: makeQcow(t, t.TempDir(), "8M"), Format: "qcow2"}, nil)
	must(t, activate(o, false))
	b := pattern(4096, 1)
	must(t, write(o, 4<<20, b, false)) // makes the table
	var p Plan
	for i, want := range []bool{true, false, false} {
		must(t, o.Prepare(&p, 1<<20+int64(i)*4096, b, MayBlock))
		if got := p.Extents[0].Fresh; len(p.Extents) != 1 || got != want {
			t.Errorf("write %d: %+v", i, p.Extents)
		}
		must(t, p.Extents[0].File.WriteAt(b, p.Extents[0].Offset, false))
		o.Commit(&p)
	}
}

// What is written to an image in memory has its place there also where the file
// was not as long when it was taken, and what is in pieces is not received.
func TestQcowPlaceInWhatGrew(t *testing.T) {
	path := makeQcow(t, testfs.Memory(t), "64M")
	o := openImage(t, Options{Path: path, Format: "qcow2"}, nil)
	must(t, activate(o, false))
	was := statOf(t, path).Size
	// The second time it is where it was put.
	for _, clusters := range []int64{4, 4} {
		var p Plan
		err := o.PrepareUnseen(&p, 32<<20, clusters<<16)
		if err == ErrWait { // a table has to be made first
			must(t, write(o, 48<<20, make([]byte, 1<<16), false))
			must(t, write(o, 32<<20-1<<16, make([]byte, 1<<16), false))
			err = o.PrepareUnseen(&p, 32<<20, clusters<<16)
		}
		must(t, err)
		e := p.Extents[0]
		if len(p.Extents) != 1 || e.Offset < was || e.File.Place(e.Offset, e.Length) == nil {
			t.Errorf("%+v has no place, or lies in the first %d bytes", p.Extents, was)
		}
		o.Commit(&p)
	}
	// Two clusters that are no neighbours in the file.
	must(t, write(o, 1<<16, make([]byte, 1<<16), false))
	must(t, write(o, 0, make([]byte, 1<<16), false))
	var p Plan
	if err := o.PrepareUnseen(&p, 0, 2<<16); err != ErrWait {
		t.Errorf("%v, %+v", err, p.Extents)
	}
	must(t, inactivate(o))
	checkQcow(t, path)
}

// Clusters that are smaller than a sector of the device cannot be punched, so what
// was freed does not read as zeros.
func TestQcowClustersSmallerThanSectors(t *testing.T) {
	dev := loopDevice(t, 4<<20, "--sector-size", "4096")
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", dev, "1M")
	o := openImage(t, Options{Path: dev, Format: "qcow2", Locking: LockingOff}, nil)
	must(t, activate(o, false))
	const part = 512 << 10
	must(t, write(o, 0, pattern(part, 1), false))
	must(t, o.Discard(0, part))
	must(t, o.Flush())
	must(t, o.Flush()) // by now they are free
	one := []byte{1}
	for off := int64(0); off < part; off += 512 {
		must(t, write(o, off, one, false))
	}
	got := make([]byte, part)
	must(t, read(o, 0, got))
	for off := range got {
		if off%512 != 0 && got[off] != 0 {
			t.Fatalf("byte %d is %d, of what was there before", off, got[off])
		}
	}
	must(t, inactivate(o))
}
