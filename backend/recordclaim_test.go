package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
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

// takeOver writes the record of another owner, locks or not, and as owners do: in
// place the change could go unseen, as kernels before Linux 6.13 date two writes of
// the same few milliseconds alike.
func takeOver(t testing.TB, image string, change func(*OwnerRecord)) {
	t.Helper()
	r := recordOf(t, image+".owner")
	change(r)
	must(t, os.WriteFile(image+".owner.other", r.bytes(), 0o600))
	must(t, os.Rename(image+".owner.other", image+".owner"))
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
	must(t, f.lock(lockReadOnly))
	if err := activate(r, false); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Error(err)
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

// From one owner to the next and back no file is made and none removed: the record
// and what it was change places, whatever the record says.
func TestRecordAndWhatItWas(t *testing.T) {
	path := writeFile(t, t.TempDir(), make([]byte, 4096))
	h := new(failing)
	r := openImage(t, Options{Path: path}, h.hook)
	must(t, activate(r, false))
	must(t, inactivate(r))
	record, was := path+".owner", path+".owner"+recordWas
	inode := func(path string) uint64 { t.Helper(); return statOf(t, path).Ino }
	one, other := inode(record), inode(was)
	unlinked := h.count(opRecordUnlink)
	for i := range uint64(3) {
		must(t, activate(r, false))
		if inode(record) != other || inode(was) != one {
			t.Fatal("the claim has not changed their places")
		}
		wantRecord(t, path, i+2, false)
		if noted, err := r.Note("word"); !noted || err != nil {
			t.Fatal(noted, err)
		}
		must(t, r.Check())
		must(t, inactivate(r))
		if inode(record) != other || inode(was) != one {
			t.Fatal("the end has not changed their places")
		}
		wantRecord(t, path, i+2, true)
		one, other = inode(record), inode(was)
	}
	if n := h.count(opRecordUnlink) - unlinked; n != 0 {
		t.Errorf("%d files removed", n)
	}
}

// What lies where the record was is written over only if it can be nothing else.
func TestRecordWasIsNothingElse(t *testing.T) {
	sector := bytes.Repeat([]byte("x"), recordSector)
	for name, put := range map[string]func(was, other string) error{
		"another name": func(was, other string) error {
			return errors.Join(os.WriteFile(other, sector, 0o600), os.Link(other, was))
		},
		"a link": func(was, other string) error {
			return errors.Join(os.WriteFile(other, sector, 0o600), os.Symlink(other, was))
		},
		"longer":  func(was, _ string) error { return os.WriteFile(was, append(sector, 'x'), 0o600) },
		"shorter": func(was, _ string) error { return os.WriteFile(was, nil, 0o600) },
		"a FIFO":  func(was, _ string) error { return unix.Mkfifo(was, 0o600) },
		"a socket": func(was, _ string) error {
			l, err := net.Listen("unix", was)
			if err == nil {
				l.(*net.UnixListener).SetUnlinkOnClose(false)
				err = l.Close()
			}
			return err
		},
		"nothing": func(string, string) error { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, t.TempDir(), make([]byte, 4096))
			other := path + ".other"
			r := openImage(t, Options{Path: path}, nil)
			must(t, activate(r, false))
			must(t, os.RemoveAll(path+".owner"+recordWas))
			must(t, put(path+".owner"+recordWas, other))
			must(t, inactivate(r))
			wantRecord(t, path, 1, true)
			noTemp(t, path)
			if b, err := os.ReadFile(other); err == nil && !bytes.Equal(b, sector) {
				t.Errorf("another file was written: %q", b)
			}
			must(t, activate(r, false))
			wantRecord(t, path, 2, false)
			must(t, inactivate(r))
		})
	}
	t.Run("another user's", func(t *testing.T) {
		path := writeFile(t, t.TempDir(), make([]byte, 4096))
		r := openImage(t, Options{Path: path}, nil)
		must(t, activate(r, false))
		must(t, inactivate(r))
		was := path + ".owner" + recordWas
		must(t, os.Chown(was, os.Getuid()+12345, -1))
		theirs, err := os.OpenFile(was, os.O_WRONLY, 0)
		must(t, err)
		defer theirs.Close()
		must(t, activate(r, false))
		_, err = theirs.WriteAt(sector, 0)
		must(t, err)
		wantRecord(t, path, 2, false)
		must(t, inactivate(r))
	})
	t.Run("another mode", func(t *testing.T) {
		path := writeFile(t, t.TempDir(), make([]byte, 4096))
		r := openImage(t, Options{Path: path}, nil)
		must(t, activate(r, false))
		must(t, inactivate(r))
		must(t, os.Chmod(path, 0o640))
		for range 2 {
			must(t, activate(r, false))
			must(t, inactivate(r))
		}
		if mode := statOf(t, path+".owner").Mode & 0o777; mode != 0o640 {
			t.Errorf("the record has mode %o, the image 640", mode)
		}
	})
}
