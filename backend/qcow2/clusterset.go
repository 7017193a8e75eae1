package qcow2

// clusterSet is a set of host clusters by number: a bit for each in words of 64
// neighbours. A member far from all others takes some 40 bytes, so that no
// tables and bitmaps, which are 6 million at most, make it larger than 250 MiB.
type clusterSet map[int64]uint64

func (s clusterSet) has(c int64) bool { return s[c>>6]>>(c&63)&1 != 0 }

// add reports whether c was not a member before.
func (s clusterSet) add(c int64) bool {
	was, bit := s[c>>6], uint64(1)<<(c&63)
	s[c>>6] = was | bit
	return was&bit == 0
}

func (s clusterSet) remove(c int64) {
	switch left := s[c>>6] &^ (1 << (c & 63)); left {
	case 0:
		delete(s, c>>6)
	default:
		s[c>>6] = left
	}
}
