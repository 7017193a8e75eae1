package integration

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestQcow2RandomRequests has clients that write parts of a disk of their own,
// which share clusters where they meet, and one that knows it all; ownership
// goes away and comes back, and then QEMU has to find the same and no fault.
// NBD_EXPORT_SOAK says how long it goes on.
func TestQcow2RandomRequests(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	seed := soakSeed(t)
	runs, until := len(qcow2Kinds), time.Time{}
	if os.Getenv("NBD_EXPORT_SOAK") != "" {
		until = time.Now().Add(soakTime(t, 0))
	}
	// Half of a run is waiting, for programs that start and for the disk.
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 2 * runtime.NumCPU() {
		wg.Go(func() {
			for !t.Failed() {
				i := int(next.Add(1) - 1)
				if i >= runs && !time.Now().Before(until) {
					return
				}
				k := qcow2Kinds[i%len(qcow2Kinds)]
				t.Run(fmt.Sprint(i, " ", k.name), func(t *testing.T) { qcow2Random(t, k, seed, uint64(i)) })
			}
		})
	}
	wg.Wait()
}

func qcow2Random(t *testing.T, k qcow2Kind, seed, number uint64) {
	rnd := rand.New(rand.NewPCG(seed, number))
	dir := shortDir(t)
	if rnd.IntN(2) == 0 {
		dir = tmpfsDir(t)
	}
	size := int64(600*kib + 512*rnd.IntN(5000))
	image, disk := k.make(t, "", dir, int64(rnd.Uint32()%1000), size)
	flags := []string{"-f", "qcow2"}
	flags = append(flags, [][]string{nil, {"--cache", "none"}, {"--cache", "writethrough"}}[rnd.IntN(3)]...)
	flags = append(flags, [][]string{nil, {"--l2-cache-size", "64k"}}[rnd.IntN(2)]...)
	t.Logf("%d bytes, %v", size, flags)
	e := serve(t, image, flags...)
	dial := func() []*rawConn {
		return []*rawConn{dialRaw(t, e.socket, ""), dialRaw(t, e.socket, ""), dialSimple(t, e.socket, "")}
	}
	all := &model{t: t, rnd: rnd, bytes: disk, conns: dial()}
	same := func(what string) {
		t.Helper()
		all.conns[0].want(0, cmdFlush, 0, 0, 0, nil)
		sameBytes(t, what, all.conns[0].want(0, cmdRead, 0, 0, uint32(size), nil).data, disk)
	}
	same("what is there at first")
	for round := range 3 {
		var wg sync.WaitGroup
		// Cut anywhere.
		cuts := []int{0, len(disk)}
		for range 4 {
			cuts = append(cuts, rnd.IntN(len(disk)))
		}
		slices.Sort(cuts)
		for i, at := range cuts[:len(cuts)-1] {
			part := &model{t: t, rnd: rand.New(rand.NewPCG(seed, number<<16|uint64(round*16+i+1))),
				at: at, bytes: disk[at:cuts[i+1]], conns: dial()}
			if len(part.bytes) <= 4096 {
				continue
			}
			wg.Go(func() {
				for range 40 {
					part.step()
					if t.Failed() {
						return
					}
				}
				for _, c := range part.conns {
					c.Close()
				}
			})
		}
		wg.Wait()
		same("after writers at once")
		for range 60 {
			if all.step(); t.Failed() {
				return
			}
		}
		same("after one")
		e.inactivate()
		qcow2Tools("").check(t, image, true)
		qcow2Tools("").same(t, image, disk)
		e.activate()
	}
	for _, c := range all.conns {
		c.Close()
	}
	e.stop()
	qcow2Tools("").check(t, image, true)
	qcow2Tools("").same(t, image, disk)
}
