package backend

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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

// noTemp sees that nothing but the record lies beside the image, and what it was.
func noTemp(t testing.TB, image string) {
	t.Helper()
	left, err := filepath.Glob(image + ".owner*")
	must(t, err)
	for _, name := range left {
		if name != image+".owner" && name != image+".owner"+recordWas {
			t.Errorf("%s is left", name)
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
			must(t, inactivate(r))
			must(t, activate(r, false)) // so that there is what it was
			must(t, c.end(r))
			wantRecord(t, path, 2, c.clean)
			noTemp(t, path)
			if _, err := os.Lstat(path + ".owner" + recordWas); (err != nil) != (c.name == "stop") {
				t.Errorf("what the record was: %v", err)
			}
			var warned []string
			next := openImage(t, Options{Path: path, Warn: func(s string) { warned = append(warned, s) }}, nil)
			must(t, activate(next, false))
			wantRecord(t, path, 3, false)
			if (len(warned) == 0) != c.clean || !c.clean && !strings.Contains(warned[0], "did not let go in order: nbd-export on ") {
				t.Errorf("%q", warned)
			}
		})
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
	if me.Numbering == "" {
		t.Error("which processes a pid counts among is not known")
	}
	for _, c := range []struct {
		host, boot, numbering string
		pid                   int
		want                  Process
	}{
		{me.Host, me.BootID, me.Numbering, me.PID, ProcessLives}, {me.Host, "x", me.Numbering, me.PID, ProcessEnded},
		{me.Host, "", me.Numbering, me.PID, ProcessUnknown}, {me.Host, me.BootID, me.Numbering, 1 << 30, ProcessEnded},
		{me.Host + "x", me.BootID, me.Numbering, me.PID, ProcessUnknown},
		// In a container, which may share the host's name.
		{me.Host, me.BootID, "pid:[1]", me.PID, ProcessUnknown}, {me.Host, me.BootID, "pid:[1]", 1 << 30, ProcessUnknown},
		{me.Host, "x", "pid:[1]", me.PID, ProcessEnded}, {me.Host, me.BootID, "", me.PID, ProcessLives},
	} {
		if got := (&OwnerRecord{Host: c.host, BootID: c.boot, Numbering: c.numbering, PID: c.pid}).Process(); got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

// A process that ended has no locks, also while nobody has asked for its exit status.
func TestProcessIsZombie(t *testing.T) {
	c := exec.Command("sh", "-c", "read line")
	in, err := c.StdinPipe()
	must(t, err)
	must(t, c.Start())
	r := thisProcess()
	r.PID = c.Process.Pid
	if got := r.Process(); got != ProcessLives {
		t.Errorf("a process that waits is %s", got)
	}
	must(t, in.Close())
	// It waits for the end, and leaves the process to Wait.
	must(t, retry(func() error {
		return unix.Waitid(unix.P_PID, r.PID, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}))
	if got := r.Process(); got != ProcessEnded {
		t.Errorf("a process that ended is %s", got)
	}
	_ = c.Wait()
	if got := r.Process(); got != ProcessEnded {
		t.Errorf("a process that is gone is %s", got)
	}
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
