package integration

import (
	"path/filepath"
	"testing"
)

func TestFioVerify(t *testing.T) {
	need(t, "fio", "fio")
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			s := startTarget(t, kind, sparseImage(t, dir, 64*mib), targetOptions{})
			fio := func(args ...string) {
				t.Helper()
				run(t, append([]string{"fio", "--ioengine=nbd", "--uri=" + s.uri, "--thread", "--group_reporting",
					"--verify=crc32c", "--verify_fatal=1", "--randrepeat=0",
					"--verify_state_save=0", "--aux-path=" + t.TempDir(), "--output=" + filepath.Join(t.TempDir(), "out")}, args...)...)
			}
			// Four jobs, each its own quarter, sizes mixed, written and verified.
			fio("--name=mixed", "--numjobs=4", "--size=16M", "--offset_increment=16M",
				"--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--iodepth=32")
			fio("--name=trim", "--numjobs=2", "--size=16M", "--offset_increment=16M",
				"--rw=randrw", "--bs=4k", "--iodepth=16", "--fsync=64", "--verify_backlog=128")
		})
	})
}
