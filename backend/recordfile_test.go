package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// leftovers are what owners that died at any step leave, if removing them is to
// be tested.
func leftovers(t testing.TB, image string, op sysop) {
	t.Helper()
	if op == opRecordUnlink {
		must(t, os.WriteFile(image+recordSuffix+recordWas, []byte("left"), 0o600))
	}
}

// The record says clean while the locks are still held, and active only when
// they are. The locks go by closing, not before.
func TestRecordOrder(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	var trace []string
	r := openImage(t, Options{Path: path}, func(op sysop, off int64, n int) (int, error) {
		switch op {
		case opLock, opClose, opSync:
			trace = append(trace, map[sysop]string{opLock: "lock", opClose: fmt.Sprintf("close(%d locks)", len(procLocks(t, path))), opSync: "sync"}[op])
		case opRecordRename:
			trace = append(trace, fmt.Sprintf("record(%d locks)", len(procLocks(t, path))))
		}
		trace = slices.Compact(trace)
		return n, nil
	})
	must(t, activate(r, false))
	must(t, r.Settle())
	r.PublishInactive()
	must(t, r.Release())
	must(t, activate(r, false))
	must(t, write(r, 0, []byte("x"), false)) // there is to be something to sync
	must(t, errors.Join(r.Settle(), r.Close()))
	const half = "lock record(5 locks) sync record(5 locks) close(5 locks)"
	// Close closes the inactive description too, which holds none.
	if got := strings.Join(trace, " "); !strings.HasPrefix(got, half+" "+half) {
		t.Error(got)
	}
}

// Died at any step of writing the record: whoever comes next finds the old one
// or the new one, and goes on.
func TestRecordCrash(t *testing.T) {
	type crash struct{}
	steps := []sysop{opRecordUnlink, opRecordCreate, opRecordWrite, opRecordClose, opRecordRename, opClose}
	for _, phase := range []string{"claim", "release"} {
		for _, op := range steps {
			for cut := range 2 { // a write cut short
				if cut > 0 && op != opRecordWrite || phase == "claim" && op == opClose {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d/%d", phase, op, cut), func(t *testing.T) {
					path := writeFile(t, t.TempDir(), make([]byte, 4096))
					first := openImage(t, Options{Path: path}, nil)
					must(t, activate(first, false))
					must(t, inactivate(first))
					leftovers(t, path, op)
					armed, seen := false, 0
					r := openImage(t, Options{Path: path}, func(o sysop, _ int64, n int) (int, error) {
						if !armed || o != op {
							return n, nil
						}
						if seen++; seen > cut {
							panic(crash{})
						}
						return 10, nil
					})
					if op == opRecordClose {
						asOnNetwork(r)
					}
					func() {
						defer func() {
							if e := recover(); e != any(crash{}) {
								t.Fatalf("no crash: %v", e)
							}
						}()
						armed = phase == "claim"
						must(t, activate(r, false))
						leftovers(t, path, op)
						must(t, r.Settle())
						r.PublishInactive()
						v := r.old
						defer unix.Close(v.file.fd) // as the kernel does
						armed = true
						must(t, r.Release())
					}()
					armed = false
					if phase == "claim" {
						r.next.file.Close()
						r.next = nil
						wantRecord(t, path, 1, true)
					} else {
						wantRecord(t, path, 2, op == opClose)
					}
					// The dead process does nothing any more.
					r.record.mu = sync.Mutex{}
					r.record.mine = nil
					if len(procLocks(t, path)) != 0 {
						t.Fatal("still locked")
					}
					want := uint64(2)
					if phase == "release" {
						want = 3
					}
					must(t, activate(first, false))
					wantRecord(t, path, want, false)
					noTemp(t, path)
				})
			}
		}
	}
}

// A failing system call at any step leaves the old record or, at the end of an
// ownership, lets the image go all the same.
func TestRecordFails(t *testing.T) {
	for _, op := range []sysop{opRecordOpen, opRecordRead, opRecordUnlink, opRecordCreate, opRecordWrite, opRecordClose, opRecordRename} {
		t.Run(fmt.Sprint(op), func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			h := new(failing)
			r := openImage(t, Options{Path: path, Warn: func(string) {}}, h.hook)
			switch op {
			case opRecordOpen, opRecordRead, opRecordClose: // when it is looked at, or put in its place
				asOnNetwork(r)
			}
			must(t, activate(r, false))
			must(t, inactivate(r))
			leftovers(t, path, op)
			h.set(op, unix.EIO)
			err := activate(r, false)
			wantErrno(t, err, unix.EIO)
			if !strings.Contains(err.Error(), "--owner-record off") || !strings.Contains(err.Error(), path+".owner") {
				t.Error(err)
			}
			h.set(op, nil)
			wantRecord(t, path, 1, true)
			if len(procLocks(t, path)) != 0 {
				t.Error("locked")
			}
			must(t, activate(r, false))
			leftovers(t, path, op)
			h.set(op, unix.EIO)
			must(t, r.Check()) // says nothing about who owns it
			must(t, r.Settle())
			r.PublishInactive()
			err = r.Release()
			if op != opRecordOpen && op != opRecordRead {
				wantErrno(t, err, unix.EIO)
			}
			h.set(op, nil)
			wantRecord(t, path, 2, false)
			if len(procLocks(t, path)) != 0 {
				t.Error("locked")
			}
			must(t, activate(r, false))
			wantRecord(t, path, 3, false)
			noTemp(t, path)
		})
	}
}

func TestRecordFlaky(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	r := openImage(t, Options{Path: path}, flaky(1))
	for i := range uint64(20) {
		must(t, activate(r, false))
		wantRecord(t, path, i+1, false)
		must(t, inactivate(r))
	}
}

func TestRecordGarbage(t *testing.T) {
	good := (&OwnerRecord{Host: "h", PID: 1, BootID: "b", Since: time.Now(), Epoch: 3, Clean: true}).bytes()
	var all map[string]any
	must(t, json.Unmarshal(good, &all))
	with := func(name string, v any) []byte {
		m := make(map[string]any)
		for k, v := range all {
			m[k] = v
		}
		m[name] = v
		if v == nil {
			delete(m, name)
		}
		b, err := json.Marshal(m)
		must(t, err)
		return b
	}
	if r, err := parseRecord(with("x-later", []int{1})); err != nil || r.Epoch != 3 || !r.Clean || r.PID != 1 || r.Since.IsZero() {
		t.Errorf("%+v, %v", r, err)
	}
	put := func(b []byte) func(string) error {
		return func(p string) error { return os.WriteFile(p, b, 0o600) }
	}
	for name, make := range map[string]func(path string) error{
		"text": put([]byte("To do: eggs")), "null": put([]byte("null")), "object": put([]byte("{}")), "zeros": put(make([]byte, 100)),
		"no host": put(with("host", nil)), "no pid": put(with("pid", nil)), "pid": put(with("pid", -1)), "no since": put(with("since", nil)),
		"no clean": put(with("clean", nil)), "no epoch": put(with("epoch", nil)), "epoch 0": put(with("epoch", 0)),
		"great epoch": put(with("epoch", uint64(1)<<63)), "negative epoch": put(with("epoch", -4)), "clean": put(with("clean", "yes")),
		"long": put(with("host", strings.Repeat("x", recordMax))), "cut": put(good[:len(good)/2]), "two": put(append(good, good...)),
		"last epoch": put(with("epoch", uint64(epochMax-1))),
		"directory":  func(p string) error { return os.Mkdir(p, 0o755) },
		"fifo":       func(p string) error { return unix.Mkfifo(p, 0o600) },
		"link":       func(p string) error { return os.Symlink("disk.img", p) },
		"dead link":  func(p string) error { return os.Symlink("none", p) },
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), []byte("image"))
			must(t, make(path+".owner"))
			r := openImage(t, Options{Path: path}, nil)
			err := activate(r, false)
			var re *RecordError
			if !errors.As(err, &re) || !strings.Contains(err.Error(), path+".owner") || !strings.Contains(err.Error(), "remove it") ||
				!strings.Contains(err.Error(), "--owner-record off") || !isErrno(err, unix.EINVAL) || strings.Contains(err.Error(), "invalid argument") {
				t.Fatal(err)
			}
			if len(procLocks(t, path)) != 0 {
				t.Error("locked")
			}
			wantContent(t, path, []byte("image"))
			must(t, os.Remove(path+".owner"))
			must(t, activate(r, false))
		})
	}
	t.Run("empty", func(t *testing.T) {
		path := writeFile(t, t.TempDir(), nil)
		must(t, os.WriteFile(path+".owner", nil, 0o600))
		var warned []string
		r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
		must(t, activate(r, false))
		wantRecord(t, path, 1, false)
		if len(warned) != 1 || !strings.Contains(warned[0], "empty") {
			t.Errorf("%q", warned)
		}
	})
}

// What stands where a record is made is named, if it cannot be removed.
func TestRecordInTheWay(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	must(t, os.Mkdir(path+".owner.was", 0o700))
	r := openImage(t, Options{Path: path}, nil)
	err := activate(r, false)
	wantErrno(t, err, unix.EISDIR)
	if !strings.Contains(err.Error(), path+".owner.was is in the way, and cannot be removed: is a directory; ") {
		t.Error(err)
	}
}

// Where nothing can be written, ownership goes on without a record, unless one
// was asked for.
func TestRecordUnwritable(t *testing.T) {
	for _, op := range []sysop{opRecordUnlink, opRecordCreate, opRecordWrite, opRecordClose, opRecordRename} {
		for _, errno := range []unix.Errno{unix.EACCES, unix.EROFS, unix.EPERM, unix.ENOSPC, unix.EDQUOT, unix.ENAMETOOLONG} {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			h := new(failing)
			var warned []string
			r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, h.hook)
			leftovers(t, path, op)
			if op == opRecordClose {
				asOnNetwork(r)
			}
			h.set(op, errno)
			for own := range uint64(3) {
				must(t, r.Acquire())
				must(t, r.Load(false))
				if epoch, err := r.Claim(own); epoch != own+1 || err != nil {
					t.Fatal(epoch, err)
				}
				r.PublishActive()
				r.Retire()
				must(t, r.Check())
				must(t, inactivate(r))
			}
			if s := r.RecordPlace().String(); !strings.HasPrefix(s, "per process ("+path+".owner cannot be written: ") {
				t.Error(s)
			}
			if len(warned) != 1 || !strings.Contains(warned[0], "--owner-record PATH") {
				t.Errorf("%q", warned)
			}
			explicit := openImage(t, Options{Path: path, OwnerRecord: path + ".rec"}, h.hook)
			if op == opRecordClose {
				asOnNetwork(explicit)
			}
			if op == opRecordUnlink {
				must(t, os.WriteFile(path+".rec"+recordWas, nil, 0o600))
			}
			err := activate(explicit, false)
			wantErrno(t, err, errno)
			h.set(op, nil)
			must(t, activate(r, false)) // works again
			wantRecord(t, path, 1, false)
		}
	}
}

// A record that is there is written over where no other file can be made: it tells who
// owns the image also on a full disk, and to users that cannot write the directory.
func TestRecordOverwritten(t *testing.T) {
	for _, op := range []sysop{opRecordCreate, opRecordWrite, opRecordRename} {
		for _, errno := range []unix.Errno{unix.EACCES, unix.EPERM, unix.ENOSPC, unix.EDQUOT} {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			for _, o := range []Options{{Path: path}, {Path: path, OwnerRecord: path + ".owner"}} {
				h := new(failing)
				o.Warn = func(s string) { t.Error(s) }
				r := openImage(t, o, h.hook)
				must(t, activate(r, false))
				must(t, inactivate(r))
				before := recordOf(t, path+".owner").Epoch
				h.set(op, errno)
				for i := range uint64(3) {
					must(t, activate(r, false))
					wantRecord(t, path, before+i+1, false)
					must(t, r.Check())
					if noted, err := r.Note("word"); !noted || err != nil || recordOf(t, path+".owner").Nonce != "word" {
						t.Error(noted, err)
					}
					must(t, inactivate(r))
					wantRecord(t, path, before+i+1, true)
				}
				// What was withdrawn stands there again.
				must(t, r.Acquire())
				must(t, r.Load(false))
				if _, err := r.Claim(0); err != nil {
					t.Fatal(err)
				}
				wantRecord(t, path, before+4, false)
				r.Withdraw()
				wantRecord(t, path, before+3, true)
				if got := r.RecordPlace().Path; got != path+".owner" {
					t.Errorf("the record is at %q", got)
				}
				noTemp(t, path)
				must(t, r.Close())
			}
		}
	}
}

// A record that was written over is read at each look: another owner may do the same
// within one tick of the file system's clock, and leave inode, size and times as they are.
func TestRecordOverwrittenIsRead(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	h := new(failing)
	r := openImage(t, Options{Path: path}, h.hook)
	look := func(reads int) {
		t.Helper()
		before := h.count(opRecordOpen)
		must(t, r.Check())
		if got := h.count(opRecordOpen) - before; got != reads {
			t.Errorf("read %d times, want %d", got, reads)
		}
	}
	must(t, activate(r, false))
	look(0)
	must(t, inactivate(r))
	h.set(opRecordCreate, unix.ENOSPC)
	must(t, activate(r, false))
	look(1)
	if noted, err := r.Note("word"); !noted || err != nil {
		t.Error(noted, err)
	}
	look(1)
	h.set(opRecordCreate, nil)
	if noted, err := r.Note("word"); !noted || err != nil {
		t.Error(noted, err)
	}
	look(0)
}

// Only what is certain to be a record of ours, whole before and after, is written over.
func TestRecordNotOverwritten(t *testing.T) {
	long := strings.Repeat("x", recordSector)
	for name, spoil := range map[string]func(t *testing.T, record string, h *failing) string{
		"another name": func(t *testing.T, record string, _ *failing) string {
			must(t, os.Link(record, record+".link"))
			return ""
		},
		"shorter": func(t *testing.T, record string, _ *failing) string {
			b, err := os.ReadFile(record)
			must(t, err)
			must(t, os.WriteFile(record, []byte(strings.ReplaceAll(string(b), "  ", "")), 0o600))
			return ""
		},
		"longer":  func(*testing.T, string, *failing) string { return "/run/" + long },
		"no room": func(_ *testing.T, _ string, h *failing) string { h.set(opRecordOverwrite, unix.ENOSPC); return "" },
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			h := new(failing)
			r := openImage(t, Options{Path: path}, h.hook)
			must(t, activate(r, false))
			must(t, inactivate(r))
			o := Options{Path: path, ControlAddress: spoil(t, path+".owner", h)}
			before, err := os.ReadFile(path + ".owner")
			must(t, err)
			r = openImage(t, o, h.hook)
			h.set(opRecordWrite, unix.ENOSPC)
			must(t, activate(r, false))
			wantContent(t, path+".owner", before)
			if r.RecordPlace().Path != "" {
				t.Error("it is said to have a record")
			}
			must(t, inactivate(r))
		})
	}
}

// Who reads beside the owner has opened what the record was by then, if two more have
// been written before it reads: half of one it does not take for what stands there.
func TestRecordReadWhileWrittenOver(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	half, goOn, noted := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	armed := false
	r := openImage(t, Options{Path: path}, func(op sysop, off int64, n int) (int, error) {
		switch {
		case !armed || op != opRecordWrite:
		case off == 0:
			return 300, nil
		default:
			close(half)
			<-goOn
		}
		return n, nil
	})
	must(t, activate(r, false))
	note := func(nonce string) error {
		_, err := r.Note(nonce)
		return err
	}
	reads := 0
	rec, _, err := readRecord(path+".owner", func(op sysop, _ int64, n int) (int, error) {
		if op != opRecordRead {
			return n, nil
		}
		switch reads++; reads {
		case 1:
			must(t, note("first"))
			armed = true
			go func() { noted <- note(strings.Repeat("x", 150)) }()
			<-half
		case 2:
			armed = false
			close(goOn)
			must(t, <-noted)
		}
		return n, nil
	})
	if reads == 1 {
		close(goOn)
		must(t, <-noted)
	}
	must(t, err)
	if rec == nil || rec.Nonce != "first" && len(rec.Nonce) != 150 {
		t.Errorf("%+v", rec)
	}
}

// Who can open the image can read its record, whoever of its users has written it.
func TestRecordOfSharedImage(t *testing.T) {
	const group, one, other = 65533, 65532, 65534
	dir, err := os.MkdirTemp("", "shared") // nothing above is closed to them
	must(t, err)
	defer os.RemoveAll(dir)
	must(t, os.Chmod(dir, 0o777))
	path := writeFile(t, dir, make([]byte, 4096))
	must(t, errors.Join(os.Chown(path, one, group), os.Chmod(path, 0o660)))
	record := path + ".owner"
	replace := func(uid int) {
		t.Helper()
		st := statOf(t, path)
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // which ends with the goroutine, and its identity with it
			groups := uint32(group)
			_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 1, uintptr(unsafe.Pointer(&groups)), 0)
			if errno != 0 {
				done <- errno
				return
			}
			if err := errors.Join(unix.Setfsgid(uid), unix.Setfsuid(uid)); err != nil {
				done <- err
				return
			}
			_, err := recordSpot{record, &st, true}.replace(make([]byte, recordSector), nil)
			done <- err
		}()
		must(t, <-done)
		if r := statOf(t, record); r.Gid != st.Gid || r.Mode&0o777 != st.Mode&0o777 {
			t.Errorf("uid %d: the record has group %d and mode %o, the image %d and %o", uid, r.Gid, r.Mode&0o777, st.Gid, st.Mode&0o777)
		}
	}
	for _, mode := range []os.FileMode{0o660, 0o664} {
		must(t, os.Chmod(path, mode))
		for _, uid := range []int{other, one, one, other, other} {
			replace(uid)
		}
	}
}
