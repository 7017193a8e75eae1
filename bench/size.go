package bench

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// sizeUnits are the suffixes of sizes and how many bits each shifts.
var sizeUnits = []struct {
	letter string
	shift  uint
}{{"T", 40}, {"G", 30}, {"M", 20}, {"k", 10}}

// ParseSize reads a size in bytes: a whole number, optionally followed by k, M,
// G or T (powers of 1024; also K, KiB, kB and so on, in any case) or B.
// Negative, fractional and too large numbers are errors.
func ParseSize(s string) (int64, error) {
	bad := func(why string) (int64, error) {
		return 0, fmt.Errorf("size %q: %s, want a number of bytes such as 512, 4k, 64M, 10G or 1T", s, why)
	}
	digits := len(s) - len(strings.TrimLeft(s, "0123456789"))
	if digits == 0 {
		if strings.HasPrefix(s, "-") {
			return bad("negative")
		}
		return bad("not a number")
	}
	shift, ok := sizeShift(s[digits:])
	if !ok {
		return bad("unknown unit")
	}
	n, err := strconv.ParseInt(s[:digits], 10, 64)
	if err != nil || n > math.MaxInt64>>shift {
		return bad("too large")
	}
	return n << shift, nil
}

func sizeShift(unit string) (shift uint, ok bool) {
	unit = strings.ToLower(unit)
	if unit == "" || unit == "b" {
		return 0, true
	}
	for _, u := range sizeUnits {
		l := strings.ToLower(u.letter)
		if unit == l || unit == l+"b" || unit == l+"ib" {
			return u.shift, true
		}
	}
	return 0, false
}

// FormatSize is the shortest exact form that ParseSize reads back: 4k, 1536, 10G.
func FormatSize(n int64) string {
	for _, u := range sizeUnits {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.letter
		}
	}
	return strconv.FormatInt(n, 10)
}

// Size is a size in bytes that can be a command line flag.
type Size int64

// String is FormatSize.
func (s *Size) String() string { return FormatSize(int64(*s)) }

// Set is ParseSize.
func (s *Size) Set(text string) error {
	n, err := ParseSize(text)
	if err == nil {
		*s = Size(n)
	}
	return err
}

// Type names the flag's argument in help texts.
func (s *Size) Type() string { return "SIZE" }
