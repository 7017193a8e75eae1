package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary owns an image until its standard input ends, if asked to:
// "EPOCH\n" says that it does.
func init() {
	path := os.Getenv("BACKEND_TEST_OWN")
	if path == "" {
		return
	}
	r, err := Open(Options{Path: path, Format: "raw", ControlAddress: "/run/b.ctl"})
	if err == nil {
		err = activate(r, false)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(r.record.mine.Epoch)
	_, _ = os.Stdin.Read(make([]byte, 1))
	if err := errors.Join(r.Settle(), r.Close()); err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

func recordOf(t testing.TB, path string) *OwnerRecord {
	t.Helper()
	r, _, err := readRecord(path, nil)
	must(t, err)
	return r
}

func wantRecord(t testing.TB, image string, epoch uint64, clean bool) {
	t.Helper()
	if r := recordOf(t, image+".owner"); r == nil || r.Epoch != epoch || r.Clean != clean {
		t.Errorf("record %+v, want epoch %d, clean %v", r, epoch, clean)
	}
}

// takeOver writes the record of another owner, locks or not.
func takeOver(t testing.TB, image string, change func(*OwnerRecord)) {
	t.Helper()
	r := recordOf(t, image+".owner")
	change(r)
	must(t, os.WriteFile(image+".owner", r.bytes(), 0o600))
}

func wantFenced(t testing.TB, err error, texts ...string) {
	t.Helper()
	var fe *FencedError
	if !errors.As(err, &fe) || !fe.Fenced() || !isErrno(err, unix.ESTALE) {
		t.Fatalf("not fenced: %v", err)
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%v; want %s", err, s)
		}
	}
}

func noTemp(t testing.TB, image string) {
	t.Helper()
	if _, err := os.Lstat(image + ".owner.tmp"); err == nil {
		t.Error("the temporary file is left")
	}
}

// leftovers are what owners that died at any step leave, if removing them is to
// be tested.
func leftovers(t testing.TB, image string, op sysop) {
	t.Helper()
	if op == opRecordUnlink {
		for _, suffix := range []string{recordTemp, recordWas} {
			must(t, os.WriteFile(image+recordSuffix+suffix, []byte("left"), 0o600))
		}
	}
}

func TestRecordLife(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		must(t, os.Chmod(path, 0o640))
		before := asIs(t, path)
		r := openImage(t, Options{Path: path, ControlAddress: "/run/a.ctl"}, nil)
		if p := r.RecordPlace(); p.String() != path+".owner" {
			t.Error(p)
		}
		start := time.Now()
		must(t, r.Acquire())
		must(t, r.Load(false))
		if _, err := os.Lstat(path + ".owner"); err == nil {
			t.Error("a record before the claim")
		}
		if epoch, err := r.Claim(4); epoch != 5 || err != nil {
			t.Fatal(epoch, err)
		}
		r.Withdraw()
		if _, err := os.Lstat(path + ".owner"); err == nil {
			t.Error("a record after the claim was withdrawn")
		}
		must(t, activate(r, false))
		rec := recordOf(t, path+".owner")
		host, _ := os.Hostname()
		boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if rec.Host != host || rec.PID != os.Getpid() || rec.BootID != strings.TrimSpace(string(boot)) ||
			rec.Control != "/run/a.ctl" || rec.Epoch != 1 || rec.Clean || rec.Since.Before(start) || rec.Since.After(time.Now()) {
			t.Errorf("%+v", rec)
		}
		st := statOf(t, path+".owner")
		if st.Mode&0o777 != 0o640 {
			t.Errorf("mode %o", st.Mode)
		}
		must(t, r.Check())
		must(t, r.Settle())
		wantRecord(t, path, 1, false)
		must(t, r.Unsettle())
		must(t, r.Settle())
		r.PublishInactive()
		wantRecord(t, path, 1, false)
		must(t, r.Release())
		wantRecord(t, path, 1, true)
		if got := recordOf(t, path+".owner"); !got.sameOwner(rec) {
			t.Errorf("%+v", got)
		}
		was := asIs(t, path+".owner")
		must(t, r.Acquire())
		must(t, r.Load(false))
		if epoch, err := r.Claim(1); epoch != 2 || err != nil {
			t.Fatal(epoch, err)
		}
		wantRecord(t, path, 2, false)
		r.Withdraw()
		if got := string(contentOf(t, path+".owner")); !strings.HasSuffix(was, fmt.Sprintf("%x", got)) {
			t.Errorf("withdrawn: %s", got)
		}
		must(t, r.Acquire())
		must(t, r.Load(true))
		_, err := r.Claim(1)
		must(t, err)
		must(t, r.Close()) // in the middle of an activation
		wantRecord(t, path, 1, true)
		noTemp(t, path)
		if asIs(t, path) != before {
			t.Error("the image has changed")
		}
	})
}

// What ends an ownership, and what the record says of it.
func TestRecordAtTheEnd(t *testing.T) {
	for _, c := range []struct {
		name  string
		end   func(r *Owned) error
		clean bool
	}{
		{"inactivate", inactivate, true},
		{"stop", func(r *Owned) error { return errors.Join(r.Settle(), r.Close()) }, true},
		{"stop, not settled", (*Owned).Close, false},
		{"taken back, then closed", func(r *Owned) error { return errors.Join(r.Settle(), r.Unsettle(), r.Close()) }, false},
		{"abandon", func(r *Owned) error {
			err := errors.Join(r.Settle(), r.Abandon())
			r.PublishInactive()
			return errors.Join(err, r.Release())
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			r := openImage(t, Options{Path: path}, nil)
			must(t, activate(r, false))
			must(t, c.end(r))
			wantRecord(t, path, 1, c.clean)
			noTemp(t, path)
			var warned []string
			next := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
			must(t, activate(next, false))
			wantRecord(t, path, 2, false)
			if (len(warned) == 0) != c.clean || !c.clean && !strings.Contains(warned[0], "did not let go in order: nbd-export on ") {
				t.Errorf("%q", warned)
			}
		})
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

// Another owner is found out at whatever looks next, and its record stays.
func TestFenced(t *testing.T) {
	for name, change := range map[string]func(*OwnerRecord){
		"higher epoch":             func(r *OwnerRecord) { r.Epoch, r.Host, r.PID = r.Epoch+5, "hostB", 99 },
		"higher epoch, clean":      func(r *OwnerRecord) { r.Epoch, r.Host, r.Clean = r.Epoch+1, "hostB", true },
		"higher epoch, same owner": func(r *OwnerRecord) { r.Epoch++ },
		"other host":               func(r *OwnerRecord) { r.Host = "hostB" },
		"other pid":                func(r *OwnerRecord) { r.PID++ },
		"other boot":               func(r *OwnerRecord) { r.BootID = "b" },
		"other container":          func(r *OwnerRecord) { r.Since = r.Since.Add(-time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			r := openImage(t, Options{Path: path}, nil)
			other := func() string {
				takeOver(t, path, change)
				return string(contentOf(t, path+".owner"))
			}
			giveUp := func() {
				t.Helper()
				must(t, r.Abandon())
				r.PublishInactive()
				must(t, r.Release())
			}
			must(t, activate(r, false))
			content := other()
			wantFenced(t, r.Check(), path+".owner", "epoch ")
			wantFenced(t, r.Settle())
			giveUp()
			wantContent(t, path+".owner", []byte(content))

			must(t, activate(r, false))
			must(t, r.Settle())
			content = other()
			r.PublishInactive()
			wantFenced(t, r.Release())
			wantContent(t, path+".owner", []byte(content))
			if len(procLocks(t, path)) != 0 {
				t.Error("locked")
			}

			must(t, r.Acquire())
			must(t, r.Load(false))
			_, err := r.Claim(0)
			must(t, err)
			content = other()
			r.Withdraw()
			wantContent(t, path+".owner", []byte(content))

			must(t, activate(r, false))
			must(t, r.Settle())
			content = other()
			wantFenced(t, r.Close())
			wantContent(t, path+".owner", []byte(content))
		})
	}
}

// The record of an owner that has its locks is put back when it is removed;
// what somebody put in its place stays.
func TestRecordRemoved(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	var warned []string
	r := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
	wantWarned := func(want ...string) {
		t.Helper()
		if !slices.EqualFunc(warned, want, strings.Contains) {
			t.Errorf("warned %q, want %q", warned, want)
		}
		warned = nil
	}
	must(t, activate(r, false))
	must(t, inactivate(r))
	must(t, activate(r, false))
	must(t, os.Remove(path+".owner"))
	must(t, r.Check())
	must(t, r.Check())
	wantRecord(t, path, 2, false)
	wantWarned("removed or set back")
	takeOver(t, path, func(r *OwnerRecord) { r.Epoch, r.Host = 1, "old" })
	must(t, r.Check())
	wantRecord(t, path, 2, false)
	wantWarned("removed or set back")

	must(t, os.WriteFile(path+".owner", []byte("mine"), 0o600))
	must(t, r.Check())
	must(t, r.Check())
	wantContent(t, path+".owner", []byte("mine"))
	wantWarned("no owner record")
	must(t, inactivate(r))
	wantContent(t, path+".owner", []byte("mine"))
	warned = nil
	must(t, os.Remove(path+".owner"))
	must(t, activate(r, false))
	must(t, os.Remove(path+".owner"))
	must(t, inactivate(r))
	wantRecord(t, path, 1, true)
	wantWarned()

	// Without locks of its own nobody puts anything back.
	must(t, activate(r, false))
	must(t, os.Remove(path+".owner"))
	v := r.cur.Load().file
	for _, b := range v.held {
		dropLock(t, v.fd, b)
	}
	var fe *FencedError
	if err := r.Check(); !errors.As(err, &fe) || !isErrno(err, unix.ENOLCK) {
		t.Error(err)
	}
	if recordOf(t, path+".owner") != nil {
		t.Error("written without locks")
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
		"directory": func(p string) error { return os.Mkdir(p, 0o755) },
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"link":      func(p string) error { return os.Symlink("disk.img", p) },
		"dead link": func(p string) error { return os.Symlink("none", p) },
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), []byte("image"))
			must(t, make(path+".owner"))
			r := openImage(t, Options{Path: path}, nil)
			err := activate(r, false)
			var re *RecordError
			if !errors.As(err, &re) || !strings.Contains(err.Error(), path+".owner") || !strings.Contains(err.Error(), "remove it") ||
				!strings.Contains(err.Error(), "--owner-record off") || !isErrno(err, unix.EINVAL) {
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

// All names of a file lead to one record.
func TestRecordOfLink(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, dir, make([]byte, 4096))
	must(t, os.Mkdir(filepath.Join(dir, "links"), 0o755))
	link := filepath.Join(dir, "links", "l")
	must(t, os.Symlink("../disk.img", link))
	a, b := openImage(t, Options{Path: path}, nil), openImage(t, Options{Path: link}, nil)
	must(t, activate(a, false))
	var le *LockError
	if err := activate(b, false); !errors.As(err, &le) || le.Holder == "" {
		t.Error(err)
	}
	must(t, inactivate(a))
	must(t, activate(b, false))
	wantRecord(t, path, 2, false)
	if left, _ := os.ReadDir(filepath.Dir(link)); len(left) != 1 || b.RecordPlace().Path != path+".owner" {
		t.Error(left, b.RecordPlace())
	}
}

func TestRecordPlaces(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, dir, make([]byte, 4096))
	must(t, os.Mkdir(filepath.Join(dir, "records"), 0o755))
	own := filepath.Join(dir, "records", "r")
	for _, c := range []struct {
		name, want string
		o          Options
		warns      bool
	}{
		{"beside", path + ".owner", Options{}, false},
		{"path", own, Options{OwnerRecord: own}, false},
		{"off", "per process (--owner-record off)", Options{OwnerRecord: "off"}, false},
		{"read-only", "per process (a read-only export writes none)", Options{ReadOnly: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.o.Path = path
			warned := 0
			c.o.Warn = func(string) { warned++ }
			r := openImage(t, c.o, nil)
			must(t, activate(r, false))
			must(t, r.Check())
			_, err := os.Lstat(c.want)
			if r.RecordPlace().String() != c.want || (err == nil) != (r.RecordPlace().Path != "") || (warned > 0) != c.warns {
				t.Errorf("%s, %v, %d warnings", r.RecordPlace(), err, warned)
			}
			must(t, inactivate(r))
			_ = os.Remove(c.want)
			_ = os.Remove(c.want + recordWas)
			if left, _ := os.ReadDir(dir); len(left) != 2 {
				t.Error(left)
			}
		})
	}
	if p := placeRecord("/dev/vda", "", true); p.String() != "per process (a block device needs --owner-record PATH)" {
		t.Error(p)
	}
	if p := placeRecord("/dev/vda", own, true); p.Path != own {
		t.Error(p)
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
				must(t, os.WriteFile(path+".rec"+recordTemp, nil, 0o600))
			}
			err := activate(explicit, false)
			wantErrno(t, err, errno)
			h.set(op, nil)
			must(t, activate(r, false)) // works again
			wantRecord(t, path, 1, false)
		}
	}
}

// Two processes: epochs go up from one to the other, and who is refused hears
// by whom.
func TestRecordOfTwoProcesses(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	r := openImage(t, Options{Path: path}, nil)
	for round := range uint64(3) {
		must(t, activate(r, false))
		wantRecord(t, path, 3*round+1, false)
		must(t, inactivate(r))
		for i, kill := range []bool{false, true} {
			epoch := 3*round + 2 + uint64(i)
			c := exec.Command(os.Args[0])
			c.Env = append(os.Environ(), "BACKEND_TEST_OWN="+path)
			in, err := c.StdinPipe()
			must(t, err)
			out, err := c.StdoutPipe()
			must(t, err)
			must(t, c.Start())
			var got uint64
			if _, err := fmt.Fscan(out, &got); err != nil || got != epoch {
				t.Fatal(got, err)
			}
			err = activate(r, false)
			var le *LockError
			want := fmt.Sprintf("pid %d, since %s, epoch %d (control /run/b.ctl)", c.Process.Pid,
				recordOf(t, path+".owner").Since.Local().Format("15:04"), epoch)
			if !errors.As(err, &le) || !strings.Contains(err.Error(), "image is owned by nbd-export on ") ||
				!strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `Failed to get "write" lock`) {
				t.Errorf("%v; want %s", err, want)
			}
			o, err := Who(path, "")
			if err != nil || o.Owner.PID != c.Process.Pid || o.Owner.Process() != ProcessLives || !o.Written() ||
				fmt.Sprint(o.Locks) != "[100 101 103 201 203]" {
				t.Errorf("%+v, %v", o, err)
			}
			if kill {
				must(t, c.Process.Kill())
			}
			must(t, in.Close())
			if err := c.Wait(); (err != nil) != kill {
				t.Error(err)
			}
			wantRecord(t, path, epoch, !kill)
			o, err = Who(path, "")
			if err != nil || o.Owner.Process() != ProcessEnded || o.Written() || len(o.Locks) > 0 {
				t.Errorf("%+v, %v", o, err)
			}
		}
	}
	// A record that names a dead process does not say who has the locks.
	f := openTest(t, path, openHow{})
	must(t, f.LockReadOnly())
	if err := activate(r, false); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Error(err)
	}
}

func TestOwnerText(t *testing.T) {
	now := time.Date(2026, 11, 23, 18, 0, 0, 0, time.UTC)
	r := OwnerRecord{Host: "host\x1bA", PID: 812, Since: now.Add(-8 * time.Hour).Add(2 * time.Minute), Epoch: 7, Control: "/run/a.ctl"}
	if s := r.Owner(now); s != "nbd-export on host?A, pid 812, since 10:02, epoch 7 (control /run/a.ctl)" {
		t.Error(s)
	}
	r.Control = ""
	if s := r.Owner(now.AddDate(1, 0, 0)); s != "nbd-export on host?A, pid 812, since 2026-11-23 10:02, epoch 7" {
		t.Error(s)
	}
	me := thisProcess()
	for _, c := range []struct {
		host, boot string
		pid        int
		want       Process
	}{
		{me.Host, me.BootID, me.PID, ProcessLives}, {me.Host, "x", me.PID, ProcessEnded}, {me.Host, "", me.PID, ProcessUnknown},
		{me.Host, me.BootID, 1 << 30, ProcessEnded}, {me.Host + "x", me.BootID, me.PID, ProcessUnknown},
	} {
		if got := (&OwnerRecord{Host: c.host, BootID: c.boot, PID: c.pid}).Process(); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// Check runs beside what changes ownership.
func TestRecordCheckedBeside(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	r := openImage(t, Options{Path: path, Warn: func(string) {}}, nil)
	must(t, activate(r, false))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := r.Check(); err != nil {
				t.Error(err)
			}
		}
	})
	for i := range 50 {
		if i%5 == 0 {
			_ = os.Remove(path + ".owner")
		}
		must(t, r.Settle())
		must(t, r.Unsettle())
	}
	must(t, r.Settle())
	r.PublishInactive()
	cancel()
	wg.Wait()
	must(t, r.Release())
	wantRecord(t, path, 1, true)
}

func TestInactiveWritesNoRecord(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, dir, make([]byte, 4096))
	r := openImage(t, Options{Path: path}, nil)
	must(t, r.Check())
	must(t, r.Flush())
	must(t, r.Close())
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Error(left)
	}
}
