// Package bytesize is how sizes in bytes are written: 512, 4k, 1.5G.
package bytesize

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
)

// units are the suffixes of sizes, and how many bits each shifts.
var units = []struct {
	letter string
	shift  uint
}{{"T", 40}, {"G", 30}, {"M", 20}, {"k", 10}}

const decimals = "0123456789"

// Parse reads a size in bytes: a number, optionally followed by k, M, G or T
// (powers of 1024; also K, KiB, kB and so on, in any case) or B. Of these four the
// number may be a fraction, as of qemu-img, 1.5G; what that comes to is rounded up
// to 512 bytes. Negative and too large numbers are errors.
func Parse(s string) (int64, error) {
	bad := func(why string) (int64, error) {
		return 0, fmt.Errorf("size %q: %s, want a number of bytes such as 512, 4k, 64M, 1.5G or 1T", s[:min(len(s), 64)], why)
	}
	unit := strings.TrimLeft(s, decimals+".")
	number := s[:len(s)-len(unit)]
	whole, part, fraction := strings.Cut(number, ".")
	switch {
	case strings.HasPrefix(s, "-"):
		return bad("negative")
	case strings.Trim(whole+part, decimals) != "" || whole+part == "":
		return bad("not a number")
	}
	shift, ok := shiftOf(unit)
	switch {
	case !ok:
		return bad("unknown unit")
	case fraction && shift == 0:
		return bad("a fraction of a byte")
	case len(number) > 40: // to reckon with them takes time that grows with it
		return bad("too many digits")
	}
	n, _ := new(big.Int).SetString(whole+part, 10)
	if n.Lsh(n, shift); fraction {
		n = sectorsOf(n, len(part))
	}
	if !n.IsInt64() {
		return bad("too large")
	}
	return n.Int64(), nil
}

// sector is what sizes that are fractions are rounded up to, in bytes, as by qemu-img.
const sector = 512

// sectorsOf is n tenths, hundredths and so on, by how many places, of a byte, rounded
// up to sectors.
func sectorsOf(n *big.Int, places int) *big.Int {
	per := new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(places)), nil)
	per.Mul(per, big.NewInt(sector))
	n.Add(n, per).Sub(n, big.NewInt(1)).Div(n, per)
	return n.Mul(n, big.NewInt(sector))
}

func shiftOf(unit string) (shift uint, ok bool) {
	unit = strings.ToLower(unit)
	if unit == "" || unit == "b" {
		return 0, true
	}
	for _, u := range units {
		l := strings.ToLower(u.letter)
		if unit == l || unit == l+"b" || unit == l+"ib" {
			return u.shift, true
		}
	}
	return 0, false
}

// Format is the shortest exact form that Parse reads back: 4k, 1536, 10G.
func Format(n int64) string {
	for _, u := range units {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.letter
		}
	}
	return strconv.FormatInt(n, 10)
}

// Size is a size in bytes that can be a command line flag.
type Size int64

// String is Format.
func (s *Size) String() string { return Format(int64(*s)) }

// Set is Parse.
func (s *Size) Set(text string) error {
	n, err := Parse(text)
	if err == nil {
		*s = Size(n)
	}
	return err
}

// Type names the flag's argument in help texts.
func (s *Size) Type() string { return "SIZE" }
