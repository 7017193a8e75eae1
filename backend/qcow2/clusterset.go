package qcow2

// clusterSet is a set of host clusters by number. It takes memory for the
// neighbourhoods that have members.
type clusterSet map[int64]*[64]uint64

func (s clusterSet) has(c int64) bool {
	p := s[c>>12]
	return p != nil && p[c>>6&63]>>(c&63)&1 != 0
}

// add reports whether c was not a member before.
func (s clusterSet) add(c int64) bool {
	p := s[c>>12]
	if p == nil {
		p = new([64]uint64)
		s[c>>12] = p
	}
	word, bit := &p[c>>6&63], uint64(1)<<(c&63)
	was := *word&bit != 0
	*word |= bit
	return !was
}

func (s clusterSet) remove(c int64) {
	if p := s[c>>12]; p != nil {
		p[c>>6&63] &^= 1 << (c & 63)
	}
}
