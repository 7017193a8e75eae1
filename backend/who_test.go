package backend

import (
	"os"
	"os/exec"
	"reflect"
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

// Whose locks they are is told of what can be seen here, whatever the record says.
func TestHolders(t *testing.T) {
	onEach(t, func(t *testing.T, dir string) {
		path := writeFile(t, dir, make([]byte, 4096))
		comm, err := os.ReadFile("/proc/self/comm")
		must(t, err)
		me := Holder{PID: os.Getpid(), Program: strings.TrimSpace(string(comm)), Locks: []int64{100, 101, 103, 201, 203}}
		r := openImage(t, Options{Path: path, OwnerRecord: OwnerRecordOff}, nil)
		who := func() []Holder {
			t.Helper()
			o, err := Who(path, "")
			must(t, err)
			return o.Holders
		}
		if got := who(); len(got) > 0 {
			t.Errorf("nobody has it, and yet %v", got)
		}
		must(t, activate(r, false))
		if got := who(); len(got) != 1 || !reflect.DeepEqual(got[0], me) {
			t.Errorf("got %v, want %v", got, me)
		}
		b := openImage(t, Options{Path: path, OwnerRecord: OwnerRecordOff}, nil)
		want := "in use by another process, " + me.String() + ": Failed to get"
		if err := b.Acquire(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("who is refused is told %v, want %s", err, want)
		}
		must(t, inactivate(r))
		must(t, r.Close())
		reader := openImage(t, Options{Path: path, ReadOnly: true}, nil)
		must(t, activate(reader, false))
		if o, err := Who(path, ""); err != nil || len(o.Holders) != 1 || len(o.Writers()) > 0 {
			t.Errorf("a reader: %+v, %v", o, err)
		}
	})
}
