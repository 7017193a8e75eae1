package bench

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A verified block consists of sectors of sectorSize bytes, each of which says
// where it belongs, which write of its block it comes from, and of which run:
//
//	 0  magic           8 bytes, all little endian
//	 8  offset          of the sector in the export, bytes
//	16  generation      of its block, from 1
//	24  run             the seed of the load
//	32  filler
//	504 checksum        CRC-32C of what precedes
//	508 zero
const (
	sectorSize   = 512
	patternMagic = 0x7261746e626478ff
	checksumAt   = 504
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fillPattern makes b, a multiple of sectorSize, the block at off.
func fillPattern(b []byte, off, generation, run uint64) {
	for ; len(b) > 0; b, off = b[sectorSize:], off+sectorSize {
		s := b[:sectorSize]
		binary.LittleEndian.PutUint64(s, patternMagic)
		binary.LittleEndian.PutUint64(s[8:], off)
		binary.LittleEndian.PutUint64(s[16:], generation)
		binary.LittleEndian.PutUint64(s[24:], run)
		x := (off+1)*0x9e3779b97f4a7c15 ^ generation*0xbf58476d1ce4e5b9 ^ run
		for i := 32; i < checksumAt; i += 8 {
			x = x*0x5851f42d4c957f2d + 0x14057b7ef767814f
			binary.LittleEndian.PutUint64(s[i:], x)
		}
		binary.LittleEndian.PutUint32(s[checksumAt:], crc32.Checksum(s[:checksumAt], castagnoli))
		binary.LittleEndian.PutUint32(s[checksumAt+4:], 0)
	}
}

// readPattern checks b, read from off, and returns its generation. blank means
// that it holds nothing but zeroes. Otherwise problem is "" or says what is
// wrong. A run of 0 accepts any run, if all of the block is of the same.
func readPattern(b []byte, off, run uint64) (generation uint64, blank bool, problem string) {
	if allZero(b) {
		return 0, true, "zeroes"
	}
	for i := 0; i < len(b); i += sectorSize {
		s, at := b[i:i+sectorSize], off+uint64(i)
		g, r := binary.LittleEndian.Uint64(s[16:]), binary.LittleEndian.Uint64(s[24:])
		switch {
		case binary.LittleEndian.Uint64(s) != patternMagic:
			return 0, false, fmt.Sprintf("no pattern at %d", at)
		case binary.LittleEndian.Uint32(s[checksumAt:]) != crc32.Checksum(s[:checksumAt], castagnoli):
			return 0, false, fmt.Sprintf("wrong checksum at %d", at)
		case binary.LittleEndian.Uint64(s[8:]) != at:
			return 0, false, fmt.Sprintf("bytes at %d belong at %d", at, binary.LittleEndian.Uint64(s[8:]))
		case i == 0:
			generation = g
			if run == 0 {
				run = r
			}
		}
		if r != run {
			return 0, false, fmt.Sprintf("bytes at %d are of run %d, not %d", at, r, run)
		}
		if g != generation {
			return 0, false, fmt.Sprintf("torn at %d: generation %d after %d", at, g, generation)
		}
	}
	return generation, false, ""
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

// maxLedger is the most blocks whose writes are remembered.
const maxLedger = 1 << 26

// ledger remembers what was written to a run of blocks by one writer at a time.
type ledger struct {
	acked []uint32 // newest generation acknowledged; 0: none
	last  []uint32 // newest generation sent
	busy  []bool   // an operation is in flight
}

func newLedger(blocks int64) *ledger {
	return &ledger{make([]uint32, blocks), make([]uint32, blocks), make([]bool, blocks)}
}

// check says what is wrong with generation g found in block i while no write to
// it is in flight, "" if nothing; problem is readPattern's.
func (l *ledger) check(i int64, g uint64, problem string) string {
	acked := uint64(l.acked[i])
	switch {
	case acked == 0 && problem != "":
		return "" // never written by us: anything but our pattern may be there
	case problem != "":
		return fmt.Sprintf("%s, want generation %d", problem, acked)
	case g < acked:
		return fmt.Sprintf("lost write: generation %d, want %d", g, acked)
	case g > acked:
		return fmt.Sprintf("generation %d, which was refused, is there, want %d", g, acked)
	}
	return ""
}

// Mismatch is a block that does not hold what it must.
type Mismatch struct {
	Offset  int64  `json:"offset"` // bytes
	Problem string `json:"problem"`
}

func (m Mismatch) String() string { return fmt.Sprintf("offset %d: %s", m.Offset, m.Problem) }
