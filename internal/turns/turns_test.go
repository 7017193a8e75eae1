package turns

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A goroutine that yields does not keep one from the only thread that became
// ready in the netpoller. The runtime's monitor would find it too, after 10 ms:
// thousands of yields.
func TestGiveAsksTheNetpoller(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	in, out, err := os.Pipe()
	must(t, err)
	defer in.Close()
	defer out.Close()
	var seen atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1)
		for {
			if n, _ := in.Read(b); n == 0 {
				return
			}
			seen.Add(1)
		}
	}()
	var y Yielder
	defer y.Close()
	const bytes, most = 1000, 8
	late := 0
	for i := range int32(bytes) {
		_, err := out.Write([]byte{0})
		must(t, err)
		yields := 0
		for ; seen.Load() == i; yields++ {
			y.Give()
		}
		if yields > most {
			late++
		}
	}
	// The monitor may have found one, and have been held up before it said so.
	if late > bytes/20 {
		t.Errorf("%d of %d bytes were not seen in %d yields", late, bytes, most)
	}
	out.Close()
	<-done
}

// However many give way, and at once, all come back, and they have one descriptor for
// it.
func TestGiveTogether(t *testing.T) {
	count := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		must(t, err)
		return len(d)
	}
	var y Yielder
	defer y.Close()
	before := count()
	const conns, times = 20, 500
	var all sync.WaitGroup
	for range conns {
		all.Go(func() {
			for range times {
				y.Give()
			}
		})
	}
	all.Wait()
	if n := count() - before; n > 1 {
		t.Errorf("%d descriptors", n)
	}
	if n := y.Rounds(); n < times || n > conns*times {
		t.Errorf("%d rounds", n)
	}
}
