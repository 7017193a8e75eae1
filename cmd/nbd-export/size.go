package main

import (
	"fmt"
	"math/big"
	"strings"

	"github.com/nbd-export/nbd-export/bench"
)

// parseSize reads a size in bytes as bench does, and a fraction of a unit, as qemu-img
// does: 1.5G. What a fraction comes to is rounded up to 512 bytes.
func parseSize(s string) (int64, error) {
	whole, rest, fraction := strings.Cut(s, ".")
	if !fraction {
		return bench.ParseSize(s)
	}
	digits := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
	unit, err := bench.ParseSize("1" + rest[len(digits):])
	switch {
	case err != nil || unit == 1 || digits == "" && whole == "" || strings.Trim(whole, "0123456789") != "":
		return 0, fmt.Errorf("size %q: want a number of bytes such as 512, or of k, M, G or T such as 1.5G", s)
	case len(s) > 40: // what follows takes time that grows with it
		return 0, fmt.Errorf("size %q...: too many digits", s[:40])
	}
	n, _ := new(big.Int).SetString(whole+digits, 10)
	n.Mul(n, big.NewInt(unit))
	const sector = 512
	per := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(len(digits))), nil)
	per.Mul(per, big.NewInt(sector))
	n.Add(n, per).Sub(n, big.NewInt(1)).Div(n, per).Mul(n, big.NewInt(sector))
	if !n.IsInt64() {
		return 0, fmt.Errorf("size %q: too large", s)
	}
	return n.Int64(), nil
}

// size is a size in bytes that is a flag.
type size int64

func (s *size) String() string { return bench.FormatSize(int64(*s)) }
func (s *size) Type() string   { return "SIZE" }

// Set implements pflag.Value.
func (s *size) Set(text string) error {
	n, err := parseSize(text)
	if err == nil {
		*s = size(n)
	}
	return err
}
