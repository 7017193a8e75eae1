package bytesize

import (
	"math"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "512b": 512, "512B": 512, "4k": 4096, "4K": 4096, "4kB": 4096, "4KiB": 4096, "4kib": 4096,
		"3M": 3 << 20, "2G": 2 << 30, "1T": 1 << 40, "0T": 0, "8388607T": 8388607 << 40, "9223372036854775807": math.MaxInt64, "007": 7,
	} {
		if got, err := Parse(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "k", "-1", "-4k", "+1", "4x", "4kk", "4 k", " 4", "4k ", "0x10", "1e3", "1_000", "4P", "٤", "4ki", "B",
		"9223372036854775808", "8388608T", "99999999999999999999",
	} {
		if got, err := Parse(text); err == nil {
			t.Errorf("%q: %d", text, got)
		}
	}
	for _, n := range []int64{0, 1, 1023, 1024, 1536, 4096, 1 << 20, 3 << 29, 1<<40 + 1, math.MaxInt64} {
		if got, err := Parse(Format(n)); err != nil || got != n {
			t.Errorf("%d: %s: %d, %v", n, Format(n), got, err)
		}
	}
	for n, want := range map[int64]string{4096: "4k", 1536: "1536", 1 << 20: "1M", 10 << 30: "10G", 1 << 50: "1024T"} {
		if got := Format(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

func TestParseFraction(t *testing.T) {
	for text, want := range map[string]int64{
		"4096": 4096, "64k": 64 << 10, "1.5G": 3 << 29, "1.5GiB": 3 << 29, "0.5k": 512, ".5M": 1 << 19, "2.M": 2 << 20, "0.0G": 0, "1.000G": 1 << 30,
		// Up to whole sectors, as qemu-img makes them.
		"1.0000001G": 1<<30 + 512, "0.1k": 512, "1.1G": 1181116416,
	} {
		got, err := Parse(text)
		if err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"1.5", "1.5b", ".", ".G", "1.5x", "1.5 G", "1..5G", "1.5.G", "-1.5G", "+1.5G", "1e.5G", "1,5G", "0x1.8G", "8388608.0T", "9999999999999.9T",
		"1." + strings.Repeat("0", 1000) + "G", "١.5G",
	} {
		if got, err := Parse(text); err == nil {
			t.Errorf("%q: %d", text, got)
		}
	}
}
