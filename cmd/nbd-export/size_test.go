package main

import (
	"strings"
	"testing"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"4096": 4096, "64k": 64 << 10, "1.5G": 3 << 29, "1.5GiB": 3 << 29, "0.5k": 512, ".5M": 1 << 19, "2.M": 2 << 20, "0.0G": 0, "1.000G": 1 << 30,
		// Up to whole sectors, as qemu-img makes them.
		"1.0000001G": 1<<30 + 512, "0.1k": 512, "1.1G": 1181116416,
	} {
		got, err := parseSize(text)
		if err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{
		"1.5", "1.5b", ".", ".G", "1.5x", "1.5 G", "1..5G", "1.5.G", "-1.5G", "+1.5G", "1e.5G", "1,5G", "0x1.8G", "8388608.0T", "9999999999999.9T",
		"1." + strings.Repeat("0", 1000) + "G", "١.5G",
	} {
		if got, err := parseSize(text); err == nil {
			t.Errorf("%q: %d", text, got)
		}
	}
}
