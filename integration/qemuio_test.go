package integration

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
)

// qemuIO runs qemu-io commands on an export; qemu-io itself compares what
// "read -P" expects. It exits with 1 when a command fails.
func qemuIO(t testing.TB, uri string, commands ...string) result {
	t.Helper()
	need(t, "qemu-io", "qemu-utils")
	return tryRun(t, qemuIOArgs(uri, commands...)...)
}

func qemuIOArgs(uri string, commands ...string) []string {
	argv := []string{"qemu-io", "-f", "raw", "-t", "writeback", "-d", "unmap"}
	for _, c := range commands {
		argv = append(argv, "-c", c)
	}
	return append(argv, uri)
}

func mustQemuIO(t testing.TB, uri string, commands ...string) string {
	t.Helper()
	r := qemuIO(t, uri, commands...)
	// "read -P" reports a mismatch on its standard output.
	if r.code != 0 || strings.Contains(r.stdout, "Pattern verification failed") {
		t.Fatalf("qemu-io %q: exit status %d\n%s%s", commands, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

func TestQemuIOPatterns(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			image := sparseImage(t, dir, 16*mib)
			s := startTarget(t, kind, image, targetOptions{})
			mustQemuIO(t, s.uri,
				"read -P 0 0 16M",
				"write -P 0x11 0 64k",
				"write -P 0x22 1M 1M",
				"write -P 0x33 4095 4098",   // over a page's edges
				"write -P 0x44 2000001 777", // nowhere near a block
				"write -P 0x55 16777215 1",  // the last byte
				"flush",
				"read -P 0x11 0 4095",
				"read -P 0x33 4095 4098",
				"read -P 0x11 8193 57343",
				"read -P 0x22 1M 951425",
				"read -P 0x44 2000001 777",
				"read -P 0x55 16777215 1",
			)
			want := make([]byte, 16*mib)
			pattern(want, 0x11, 0, 64*kib)
			pattern(want, 0x22, mib, mib)
			pattern(want, 0x33, 4095, 4098)
			pattern(want, 0x44, 2000001, 777)
			pattern(want, 0x55, 16*mib-1, 1)
			sameBytes(t, "the file", readFile(t, image), want)
		})
	})
}

func pattern(b []byte, v byte, off, n int) {
	copy(b[off:off+n], bytes.Repeat([]byte{v}, n))
}

func TestQemuIOZeroesAndDiscards(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			image := randomImage(t, dir, 1, 8*mib)
			s := startTarget(t, kind, image, targetOptions{})
			want := readFile(t, image)
			mustQemuIO(t, s.uri,
				"write -z 0 64k",           // zeroes, allocated
				"write -z -u 1M 1M",        // zeroes, a hole is welcome
				"write -z 3000001 12345",   // unaligned
				"write -z -u 3100001 9999", // unaligned, a hole is welcome
				"write -z -f 5M 64k",       // durable when answered
				"write -f -P 0x77 6M 4k",
				"read -P 0 0 64k",
				"read -P 0 1M 1M",
				"read -P 0 3000001 12345",
				"read -P 0 3100001 9999",
				"read -P 0 5M 64k",
				"read -P 0x77 6M 4k",
				"discard 2M 512k",
				"flush",
			)
			for _, z := range [][2]int{{0, 64 * kib}, {mib, mib}, {3000001, 12345}, {3100001, 9999}, {5 * mib, 64 * kib}} {
				pattern(want, 0, z[0], z[1])
			}
			pattern(want, 0x77, 6*mib, 4*kib)
			got := readFile(t, image)
			// A discarded range may read as zeroes or as before.
			if old := got[2*mib : 2*mib+512*kib]; bytes.Count(old, []byte{0}) == len(old) {
				pattern(want, 0, 2*mib, 512*kib)
			}
			sameBytes(t, "the file", got, want)
		})
	})
}

// Zeroes keep their space unless a hole is welcome; a discard gives it back.
func TestQemuIOZeroesAndDiscardsSpace(t *testing.T) {
	everyServer(t, func(t *testing.T, kind string) {
		everyPlace(t, func(t *testing.T, dir string) {
			image := randomImage(t, dir, 2, 4*mib)
			s := startTarget(t, kind, image, targetOptions{})
			full := snap(t, image).blocks
			mustQemuIO(t, s.uri, "write -z 0 1M", "flush")
			if b := snap(t, image).blocks; b < full {
				t.Errorf("zeroing without -u freed %d blocks", full-b)
			}
			mustQemuIO(t, s.uri, "write -z -u 1M 1M", "flush")
			if b := snap(t, image).blocks; b > full-mib/512 {
				t.Errorf("%d blocks after zeroing 1 MiB with -u, %d before: no hole", b, full)
			}
			mustQemuIO(t, s.uri, "discard 2M 1M", "flush")
			if b := snap(t, image).blocks; b > full-2*mib/512 {
				t.Errorf("%d blocks after a discard of 1 MiB more, %d at first: no hole", b, full)
			}
		})
	})
}

// An image that was given its space keeps it with --discard ignore.
func TestDiscardIgnore(t *testing.T) {
	image := randomImage(t, tmpfsDir(t), 2, 4*mib)
	e := serve(t, image, "--discard", "ignore")
	full := snap(t, image).blocks
	mustQemuIO(t, e.uri(), "discard 0 2M", "write -z -u 2M 2M", "flush")
	if b := snap(t, image).blocks; b < full {
		t.Errorf("%d blocks were freed", full-b)
	}
	mustQemuIO(t, e.uri(), "read -P 0 2M 2M")
}

// Sizes that are no multiple of 512: QEMU's server rounds them down, so only
// ours is asked.
func TestQemuIOOddSizes(t *testing.T) {
	for _, size := range []int64{1, 511, 513, 4097, mib + 7} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			image := randomImage(t, tmpfsDir(t), size, size)
			e := serve(t, image)
			want := readFile(t, image)
			c := dialRaw(t, e.socket, "")
			if c.size != uint64(size) {
				t.Fatalf("export size %d, want %d", c.size, size)
			}
			sameBytes(t, "a read", c.want(0, cmdRead, 0, 0, uint32(size), nil).data, want)
			c.want(0, cmdWrite, 0, uint64(size-1), 1, []byte{0xab})
			want[size-1] = 0xab
			c.want(nbdENOSPC, cmdWrite, 0, uint64(size-1), 2, []byte{1, 2})
			c.want(nbdEINVAL, cmdRead, 0, uint64(size-1), 2, nil)
			c.want(0, cmdWriteZeroes, 0, 0, uint32(size), nil)
			c.want(0, cmdWrite, flagFUA, 0, uint32(size), want)
			sameBytes(t, "the file", readFile(t, image), want)
			if size >= 512 {
				// QEMU asks for whole sectors only and reads the rest as part
				// of the last one.
				mustQemuIO(t, e.uri(), "write -P 0x66 0 512", "read -P 0x66 0 512")
				pattern(want, 0x66, 0, 512)
				sameBytes(t, "the file after qemu-io", readFile(t, image), want)
			}
		})
	}
}

func TestQemuImgCompare(t *testing.T) {
	need(t, "qemu-img", "qemu-utils")
	everyServer(t, func(t *testing.T, kind string) {
		image := patchyImage(t, tmpfsDir(t), 8*mib)
		s := startTarget(t, kind, image, targetOptions{})
		run(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", image, s.uri)
		other := t.TempDir() + "/other"
		b := readFile(t, image)
		b[5*mib] ^= 1
		if err := os.WriteFile(other, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if r := tryRun(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", other, s.uri); r.code != 1 {
			t.Errorf("compare with an image that differs in one bit: exit status %d, want 1", r.code)
		}
	})
}
