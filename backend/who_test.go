package backend

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Who has the locks without having been able to write the record is not taken
// for the one that wrote it last and lives.
func TestWhoOfAStaleRecord(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		other := exec.Command("sleep", "1000")
		must(t, other.Start())
		t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
		says := func(pid int) {
			t.Helper()
			r := thisProcess()
			r.PID, r.Since, r.Epoch = pid, time.Now().Round(0), 7
			must(t, os.WriteFile(path+".owner", r.bytes(), 0o600))
		}
		stale := func(want bool) {
			t.Helper()
			o, err := Who(path, "")
			must(t, err)
			if o.Stale != want || o.Owner == nil {
				t.Errorf("stale %v of %+v, want %v", o.Stale, o.Owner, want)
			}
		}
		says(other.Process.Pid)
		stale(false) // nobody has the locks
		for _, cache := range []CacheMode{CacheWriteback, CacheNone} {
			r := openImage(t, Options{Path: path, OwnerRecord: OwnerRecordOff, Cache: cache}, nil)
			must(t, activate(r, false))
			says(other.Process.Pid)
			stale(true)
			b := openImage(t, Options{Path: path}, nil)
			if err := b.Acquire(); err == nil || !strings.Contains(err.Error(), "in use by another process") {
				t.Errorf("who is refused is told %v", err)
			}
			says(os.Getpid())
			stale(false)
			if err := b.Acquire(); err == nil || !strings.Contains(err.Error(), "owned by nbd-export on ") {
				t.Errorf("who is refused is told %v", err)
			}
			must(t, inactivate(r))
			must(t, r.Close())
		}
	})
}
