package integration

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/nbd-export/nbd-export/client"
)

// killLoad writes sectors that say which write they are of, and knows what each
// may hold when the exporter has been killed: what it held when a flush began
// that has ended, or anything written since.
type killLoad struct {
	mu     sync.Mutex
	next   uint64
	wrote  [][]uint64 // of each sector, the writes in order; 0 are zeros
	acked  []int      // of each sector, the last of them that was answered
	oldest []int      // of each sector, the first of them that it may hold
	done   int        // writes that were answered
}

func killSector(number uint64, sector int) []byte {
	b := make([]byte, 512)
	if number == 0 {
		return b
	}
	for i := 0; i < len(b); i += 16 {
		binary.BigEndian.PutUint64(b[i:], number)
		binary.BigEndian.PutUint64(b[i+8:], uint64(sector))
	}
	return b
}

// write changes sectors that nobody else changes meanwhile.
func (l *killLoad) write(c *client.Conn, rnd *rand.Rand, first, n int) error {
	zeros, fua := rnd.IntN(6) == 0, rnd.IntN(20) == 0
	var number uint64
	l.mu.Lock()
	if !zeros {
		l.next++
		number = l.next
	}
	for s := first; s < first+n; s++ {
		l.wrote[s] = append(l.wrote[s], number)
	}
	l.mu.Unlock()
	var err error
	if zeros {
		err = c.WriteZeroes(int64(first)*512, uint32(n)*512, uint16(rnd.IntN(2))*flagNoHole)
		fua = false
	} else {
		var p []byte
		for s := first; s < first+n; s++ {
			p = append(p, killSector(number, s)...)
		}
		_, err = c.WriteAt(p, int64(first)*512, fua)
	}
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.done++
	for s := first; s < first+n; s++ {
		l.acked[s] = len(l.wrote[s]) - 1
		if fua {
			l.oldest[s] = l.acked[s]
		}
	}
	return nil
}

func (l *killLoad) flush(c *client.Conn) error {
	l.mu.Lock()
	acked := slices.Clone(l.acked)
	l.mu.Unlock()
	if err := c.Flush(); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for s := range acked {
		l.oldest[s] = max(l.oldest[s], acked[s])
	}
	return nil
}

// judge takes what the disk holds for what it held before the next load.
func (l *killLoad) judge(t *testing.T, disk []byte) {
	t.Helper()
	for s := range l.wrote {
		got := disk[s*512:][:512]
		number := binary.BigEndian.Uint64(got)
		may := l.wrote[s][l.oldest[s]:]
		switch {
		case !bytes.Equal(got, killSector(number, s)):
			t.Fatalf("sector %d holds bytes of write %d of sector %d", s, number, binary.BigEndian.Uint64(got[8:]))
		case !slices.Contains(may, number):
			t.Fatalf("sector %d holds write %d; since the last flush it may hold %v", s, number, may)
		}
		l.wrote[s], l.acked[s], l.oldest[s] = []uint64{number}, 0, 0
	}
}

// TestQcow2Killed kills exporters of qcow2 images while clients write and flush.
// What is left has no fault but leaks, holds what was flushed, and can be served
// again. NBD_EXPORT_SOAK makes it a hundred.
func TestQcow2Killed(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	seed := soakSeed(t)
	kills := 6
	if os.Getenv("NBD_EXPORT_SOAK") != "" {
		kills = 100
	}
	kinds := []qcow2Kind{
		{name: "4k", options: "cluster_size=4k"},
		{name: "usual"},
		{name: "subclusters", options: "extended_l2=on,cluster_size=16k"},
		{name: "512, 64 bits", options: "cluster_size=512,refcount_bits=64"},
		{name: "data file", options: "data_file=DIR/data,cluster_size=4k"},
		{name: "snapshots", options: "cluster_size=4k"},
	}
	for i, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, uint64(i)))
			for range (kills + len(kinds) - 1) / len(kinds) / 4 {
				qcow2Kills(t, k, rnd, 4)
			}
			qcow2Kills(t, k, rnd, max(1, (kills+len(kinds)-1)/len(kinds)%4))
		})
	}
}

func qcow2Kills(t *testing.T, k qcow2Kind, rnd *rand.Rand, times int) {
	const sectors, workers = 4000, 8
	dir := tmpfsDir(t)
	image, disk := k.make(t, "", dir, 0, sectors*512)
	l := &killLoad{wrote: make([][]uint64, sectors), acked: make([]int, sectors), oldest: make([]int, sectors)}
	for s := range l.wrote {
		l.wrote[s] = []uint64{0}
	}
	for kill := range times {
		e := serve(t, image, "-f", "qcow2")
		ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
		defer cancel()
		var wg sync.WaitGroup
		for w := range workers {
			c, err := client.Dial(ctx, e.uri(), client.Options{})
			if err != nil {
				t.Fatal(err)
			}
			r := rand.New(rand.NewPCG(rnd.Uint64(), uint64(w)))
			wg.Go(func() {
				defer c.Abort()
				for { // until it is killed
					// Stripes of 4 sectors in turn, of which many lie in a cluster.
					first := (r.IntN(sectors/4/workers)*workers + w) * 4
					n := 1 + r.IntN(4)
					err := error(nil)
					if r.IntN(20) == 0 {
						err = l.flush(c)
					} else {
						err = l.write(c, r, first, n)
					}
					if err != nil {
						return
					}
				}
			})
		}
		enough := 200 + rnd.IntN(3000)
		waitFor(t, startTimeout, fmt.Sprintf("%d writes", enough), func() bool {
			l.mu.Lock()
			defer l.mu.Unlock()
			return l.done >= enough
		})
		l.done = 0
		e.kill()
		wg.Wait()
		qcow2Tools("").check(t, image, false)
		raw := filepath.Join(dir, "killed.raw")
		run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
		disk = readFile(t, raw)
		l.judge(t, disk)
		if k.name == "snapshots" {
			run(t, "qemu-img", "snapshot", "-c", fmt.Sprint("s", kill), image)
		}
	}
	e := serve(t, image, "-f", "qcow2")
	c := dialRaw(t, e.socket, "")
	sameBytes(t, "served again", c.want(0, cmdRead, 0, 0, sectors*512, nil).data, disk)
	c.Close()
	e.stop()
}

// TestQcow2ReadOfStalledClient has a client that asks for everything and reads
// nothing, while others discard that, and write elsewhere what takes its place.
// What it gets at last is its own, as it was or discarded.
func TestQcow2ReadOfStalledClient(t *testing.T) {
	const size, sectors = 16 * mib, 16 * mib / 512
	for _, options := range []string{"cluster_size=4k", "cluster_size=64k"} {
		everyPlace(t, func(t *testing.T, dir string) {
			k := qcow2Kind{options: options}
			image, _ := k.make(t, "", dir, 0, 2*size)
			e := serve(t, image, "-f", "qcow2")
			writer := dialRaw(t, e.socket, "")
			fill := func(number uint64, first int) {
				for s := first; s < first+sectors; s += 2048 {
					var p []byte
					for i := range 2048 {
						p = append(p, killSector(number, s+i)...)
					}
					writer.want(0, cmdWrite, 0, uint64(s)*512, uint32(len(p)), p)
				}
			}
			fill(1, 0)
			stalled := dialSimple(t, e.socket, "")
			const each = size / 8
			for i := range uint64(8) {
				stalled.send(cmdRead, 0, i*each, each, nil)
			}
			for round := range 2 {
				writer.want(0, cmdTrim, 0, 0, size, nil)
				writer.want(0, cmdFlush, 0, 0, 0, nil)
				fill(uint64(2+round), sectors)
				writer.want(0, cmdTrim, 0, size, size, nil)
				writer.want(0, cmdFlush, 0, 0, 0, nil)
			}
			fill(9, sectors)
			late := make(map[uint64]reply)
			for range 8 {
				rep := stalled.receive(0, each)
				late[rep.cookie] = rep
			}
			cookies := slices.Sorted(func(yield func(uint64) bool) {
				for c := range late {
					if !yield(c) {
						return
					}
				}
			})
			for i, cookie := range cookies {
				for n := range each / 512 {
					s := i*each/512 + n
					got := late[cookie].data[n*512:][:512]
					if number := binary.BigEndian.Uint64(got); number > 1 || !bytes.Equal(got, killSector(number, s)) {
						t.Fatalf("sector %d: the late read sees write %d of sector %d", s, number, binary.BigEndian.Uint64(got[8:]))
					}
				}
			}
			stalled.Close()
			writer.Close()
			e.stop()
			qcow2Tools("").check(t, image, true)
		})
	}
}

// TestQcow2NeighboursInOneCluster has eight connections that write into clusters
// which nobody has written yet, parts that share sectors, down to single bytes:
// all are there.
func TestQcow2NeighboursInOneCluster(t *testing.T) {
	const conns, clusters, cluster = 8, 24, 64 * kib
	for _, cache := range []string{"writeback", "none"} {
		for _, options := range []string{"", "extended_l2=on", "data_file=DIR/data"} {
			for _, part := range []int{1, 100, 5000} {
				t.Run(fmt.Sprintf("%s %s %d", cache, options, part), func(t *testing.T) {
					dir := t.TempDir()
					k := qcow2Kind{options: options, backing: "raw"}
					image, disk := k.make(t, "", dir, 1, clusters*cluster)
					e := serve(t, image, "-f", "qcow2", "--cache", cache)
					var wg sync.WaitGroup
					for i := range conns {
						c := dialRaw(t, e.socket, "")
						wg.Go(func() {
							for k := range clusters {
								off := k*cluster + 3000 + i*part
								b := bytes.Repeat([]byte{byte(1 + i*clusters + k)}, part)
								copy(disk[off:], b)
								c.want(0, cmdWrite, 0, uint64(off), uint32(part), b)
							}
							c.Close()
						})
					}
					wg.Wait()
					c := dialRaw(t, e.socket, "")
					sameBytes(t, "read back", c.want(0, cmdRead, 0, 0, uint32(len(disk)), nil).data, disk)
					c.Close()
					e.stop()
					qcow2Tools("").check(t, image, true)
					qcow2Tools("").same(t, image, disk)
				})
			}
		}
	}
}
