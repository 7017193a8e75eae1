package integration

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// TestQcow2BesideBothQEMUs has images of every kind made by QEMU 7.2 and by 10,
// read and changed by us, checked, read and changed by both, and read by us again.
func TestQcow2BesideBothQEMUs(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	seed := soakSeed(t)
	seven := qcow2Tools(strings.TrimSpace(run(t, "scripts/qemu7")))
	for i, k := range qcow2Kinds {
		for _, maker := range []qcow2Tools{"", seven} {
			name := "made by 10/"
			if maker == seven {
				name = "made by 7.2/"
			}
			t.Run(name+k.name, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, uint64(i)))
				image, disk := k.make(t, maker, tmpfsDir(t), int64(i), 900*kib+512)
				for round, q := range []qcow2Tools{seven, ""} {
					e := serve(t, image, "-f", "qcow2")
					m := &model{t: t, rnd: rnd, bytes: disk, conns: []*rawConn{dialRaw(t, e.socket, ""), dialSimple(t, e.socket, "")}}
					sameBytes(t, "as QEMU left it", m.conns[0].want(0, cmdRead, 0, 0, uint32(len(disk)), nil).data, disk)
					for range 60 {
						if m.step(); t.Failed() {
							return
						}
					}
					for _, c := range m.conns {
						c.Close()
					}
					e.stop()
					for _, by := range []qcow2Tools{seven, ""} {
						by.check(t, image, true)
						by.same(t, image, disk)
					}
					off := 4096 * rnd.IntN(len(disk)/4096-20)
					run(t, q.path("qemu-io"), "-f", "qcow2", "-d", "unmap",
						"-c", fmt.Sprintf("write -q -P %d %d 30000", 11+round, off),
						"-c", fmt.Sprintf("write -q -z -u %d 8192", off+40000), image)
					for i := range 30000 {
						disk[off+i] = byte(11 + round)
					}
					clear(disk[off+40000 : off+40000+8192])
				}
				e := serve(t, image, "-f", "qcow2", "--read-only")
				c := dialRaw(t, e.socket, "")
				sameBytes(t, "as QEMU left it", c.want(0, cmdRead, 0, 0, uint32(len(disk)), nil).data, disk)
				c.Close()
				e.stop()
			})
		}
	}
}
