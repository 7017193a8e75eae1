package bench

import (
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/client"
	"github.com/nbd-export/nbd-export/export/wire"
)

// The load goes where writes are taken, and knows for how long none were.
func TestFollow(t *testing.T) {
	var active [2]atomic.Bool
	var wrote [2]atomic.Int64
	var uris [2]string
	for i := range uris {
		f := newFake(1 << 20)
		f.refuse = func(cmd uint16) (uint32, string) {
			if cmd != wire.CmdWrite {
				return 0, ""
			}
			if !active[i].Load() {
				return uint32(syscall.EPERM), "export is inactive"
			}
			wrote[i].Add(1)
			return 0, ""
		}
		uris[i] = f.uri(t)
	}
	active[0].Store(true)
	f, err := Follow(t.Context(), FollowConfig{URIs: uris, Conns: 2, Depth: 3, BlockSize: 4096, Size: 1 << 20, Rate: 20000, Reads: true})
	if err != nil {
		t.Fatal(err)
	}
	const away = 20 * time.Millisecond
	for n := range 6 {
		from, to := n%2, 1-n%2
		for start := wrote[from].Load(); wrote[from].Load() < start+20; {
			time.Sleep(time.Millisecond)
			if err := f.Err(); err != nil {
				t.Fatal(err)
			}
		}
		off := client.Now()
		active[from].Store(false)
		time.Sleep(away)
		active[to].Store(true)
		gap, err := f.WriteGap(t.Context(), to)
		if err != nil {
			t.Fatal(err)
		}
		// A reply may still have been on its way when writes ended.
		if most := time.Duration(client.Now() - off); gap < away/2 || gap > most+away {
			t.Errorf("gap %v, want %v to %v", gap, away, most)
		}
		if g := f.ReadGap(); g.Longest <= 0 || g.Moving != g.Longest {
			t.Errorf("reads: %v", g)
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// A load whose exporter goes away ends with an error, also for who waits.
func TestFollowFails(t *testing.T) {
	f := newFake(1 << 20)
	f.refuse = func(cmd uint16) (uint32, string) { return uint32(syscall.EIO), "" }
	uri := f.uri(t)
	l, err := Follow(t.Context(), FollowConfig{URIs: [2]string{uri, uri}, Conns: 1, Depth: 1, BlockSize: 4096, Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.WriteGap(t.Context(), 1); err == nil {
		t.Error("no error")
	}
	if err := l.Close(); err == nil {
		t.Error("no error at the end")
	}
	if _, err := Follow(t.Context(), FollowConfig{URIs: [2]string{uri, "nbd+unix:///?socket=/nowhere"}, Conns: 1, Depth: 1}); err == nil {
		t.Error("no error without a server")
	}
}
