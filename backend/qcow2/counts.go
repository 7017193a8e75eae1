package qcow2

import (
	"maps"
	"slices"
)

// counts are how often host clusters are named, by number. They take 1 KiB of
// memory for each neighbourhood of 256 clusters that has any: less where entries
// lead far apart in a file of holes than with larger ones, and no longer (1.0 s for
// a full disk of 1 TiB, also with 4096; 1.4 s with 64).
type counts map[int64]*[countsPage]uint32

const countsPage = 256

func (s counts) get(c int64) uint32 {
	if p := s[c/countsPage]; p != nil {
		return p[c%countsPage]
	}
	return 0
}

// add counts n more of a cluster, up to most, and returns how many are over.
func (s counts) add(c int64, n, most uint32) (over uint32) {
	p := s[c/countsPage]
	if p == nil {
		p = new([countsPage]uint32)
		s[c/countsPage] = p
	}
	more := min(n, most-p[c%countsPage])
	p[c%countsPage] += more
	return n - more
}

// pages are the numbers of the neighbourhoods, in ascending order.
func (s counts) pages() []int64 { return slices.Sorted(maps.Keys(s)) }

// end is the number after the last cluster that is named.
func (s counts) end() int64 {
	pages := s.pages()
	for i := len(pages) - 1; i >= 0; i-- {
		p := s[pages[i]]
		for c := countsPage - 1; c >= 0; c-- {
			if p[c] > 0 {
				return pages[i]*countsPage + int64(c) + 1
			}
		}
	}
	return 0
}
