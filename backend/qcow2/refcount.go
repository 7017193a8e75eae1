package qcow2

import "encoding/binary"

// refcount reads number i of a refcount block b as it stands in the file
// (section "Refcount blocks"). Widths under 8 bits are packed from the low
// end of each byte.
func (g Geometry) refcount(b []byte, i int64) uint64 {
	be := binary.BigEndian
	switch g.RefcountOrder {
	case 0, 1, 2:
		width := uint(1) << g.RefcountOrder
		perByte := int64(8 / width)
		return uint64(b[i/perByte]) >> (uint(i%perByte) * width) & (1<<width - 1)
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(be.Uint16(b[2*i:]))
	case 5:
		return uint64(be.Uint32(b[4*i:]))
	}
	return be.Uint64(b[8*i:])
}

// setRefcount changes number i of a refcount block; v is at most maxRefcount.
func (g Geometry) setRefcount(b []byte, i int64, v uint64) {
	be := binary.BigEndian
	switch g.RefcountOrder {
	case 0, 1, 2:
		width := uint(1) << g.RefcountOrder
		perByte := int64(8 / width)
		shift := uint(i%perByte) * width
		mask := byte(1<<width-1) << shift
		b[i/perByte] = b[i/perByte]&^mask | byte(v<<shift)
	case 3:
		b[i] = byte(v)
	case 4:
		be.PutUint16(b[2*i:], uint16(v))
	case 5:
		be.PutUint32(b[4*i:], uint32(v))
	default:
		be.PutUint64(b[8*i:], v)
	}
}
