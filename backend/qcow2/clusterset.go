package qcow2

// clusterSet is a set of host clusters by number: a bit for each in words of 64
// neighbours. A member far from all others takes some 40 bytes, so that tables and
// bitmaps, which are 6 million at most, do not make it larger than 250 MiB.
type clusterSet map[int64]uint64

func (s clusterSet) has(c int64) bool { return s[c>>6]>>(c&63)&1 != 0 }

// add reports whether c was not a member before.
func (s clusterSet) add(c int64) bool {
	was, bit := s[c>>6], uint64(1)<<(c&63)
	s[c>>6] = was | bit
	return was&bit == 0
}

// addRange adds first to last, and reports whether none was a member before.
func (s clusterSet) addRange(first, last int64) bool {
	fresh := true
	for w := first >> 6; w <= last>>6; w++ {
		bits := ^uint64(0)
		if w == first>>6 {
			bits <<= first & 63
		}
		if w == last>>6 {
			bits &= ^uint64(0) >> (63 - last&63)
		}
		was := s[w]
		s[w] = was | bits
		fresh = fresh && was&bits == 0
	}
	return fresh
}

func (s clusterSet) remove(c int64) {
	switch left := s[c>>6] &^ (1 << (c & 63)); left {
	case 0:
		delete(s, c>>6)
	default:
		s[c>>6] = left
	}
}
