package backend

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/nbd-export/nbd-export/internal/testfs"
)

// While a range is claimed all that changes the file waits there, and only there.
func TestClaimKeepsChangesAway(t *testing.T) {
	const size = 4 * claimGrain
	path := filepath.Join(testfs.Memory(t), "image")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	f := openTest(t, path, openHow{write: true})
	if f.Place(0, size) == nil {
		t.Fatal("no place")
	}
	b := make([]byte, 4096)
	for name, change := range map[string]func(off int64) error{
		"try":     func(off int64) error { _, err := f.TryWriteAt(b, off); return err },
		"vector":  func(off int64) error { _, err := f.TryWriteVector([][]byte{b, b}, off-4096); return err },
		"write":   func(off int64) error { return f.WriteAt(b, off, false) },
		"durable": func(off int64) error { return f.WriteAt(b, off, true) },
		"discard": func(off int64) error { return f.Discard(off, 4096) },
		"zero":    func(off int64) error { return f.Zero(off, 4096, 0) },
		"no hole": func(off int64) error { return f.Zero(off, 4096, NoHole) },
		"long":    func(off int64) error { return f.Zero(0, size, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			c := f.Claim(claimGrain, claimGrain)
			if !c.Try() {
				t.Fatal("claimed by nobody, and not to be had")
			}
			if o := f.Claim(2*claimGrain-1, 2); o.Try() {
				t.Fatal("claimed twice")
			}
			if name != "long" {
				if err := change(3 * claimGrain); err != nil {
					t.Fatalf("a change elsewhere: %v", err)
				}
			}
			done := make(chan error, 1)
			go func() { done <- change(claimGrain + 4096) }()
			for !waitsForClaim() {
				select {
				case err := <-done:
					t.Fatalf("it did not wait: %v", err)
				default:
					runtime.Gosched()
				}
			}
			c.Release()
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if !c.Try() {
				t.Fatal("a change that has ended keeps a claim away")
			}
			c.Release()
		})
	}
}

// waitsForClaim tells whether a goroutine waits in unclaimed.
func waitsForClaim() bool {
	b := make([]byte, 1<<20)
	for g := range strings.SplitSeq(string(b[:runtime.Stack(b, true)]), "\n\n") {
		if first, _, _ := strings.Cut(g, "\n"); strings.Contains(first, "sync.RWMutex.RLock") && strings.Contains(g, ").unclaimed(") {
			return true
		}
	}
	return false
}

// What begins at the same lock, of two files or in one that is long enough, is kept
// apart from itself at most: nothing waits for what it holds.
func TestClaimsComeRound(t *testing.T) {
	f := &File{placeable: true, id: inode{ino: 7}}
	all := f.Claim(0, 3*claimLocks*claimGrain)
	if !all.Try() {
		t.Fatal("a long claim is not to be had")
	}
	if f.Claim(claimGrain, 1).Try() {
		t.Fatal("claimed twice")
	}
	all.Release()
	c := f.unclaimed(0, 3*claimLocks*claimGrain)
	if f.Claim(5*claimGrain, 1).Try() {
		t.Fatal("claimed while it is changed")
	}
	c.changed()
	part := f.Claim(0, 2*claimGrain)
	for _, tt := range []struct {
		off, n int64
		want   bool
	}{{0, 1, true}, {0, 2 * claimGrain, true}, {claimGrain, claimGrain, true}, {claimGrain, claimGrain + 1, false}, {2 * claimGrain, 1, false}} {
		if got := part.Covers(f.Claim(tt.off, tt.n)); got != tt.want {
			t.Errorf("%d+%d: %v", tt.off, tt.n, got)
		}
	}
	if (Claim{}).Covers(part) || !part.Try() {
		t.Error("nothing covers something, or what nobody has is not to be had")
	}
	part.Release()
}
