package qcow2

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Snapshot is an internal snapshot (section "Snapshots").
type Snapshot struct {
	ID, Name  string
	Date      time.Time
	VMClock   time.Duration
	StateSize int64 // bytes of the VM's state
	Icount    int64 // -1 if it is not recorded
	Size      int64 // of the disk
	L1Offset  int64
	L1Entries int
	at        int64 // offset of its entry in the file
	extra     int64 // bytes of extra data of the entry
}

const (
	maxSnapshotTable = 64 << 20 // bytes; as QEMU
	maxSnapshotExtra = 1024
)

// Snapshots reads the snapshot table.
func Snapshots(f File, h *Header) ([]Snapshot, error) {
	all, _, err := readSnapshots(f, h)
	return all, err
}

// readSnapshots also returns the table's length in bytes.
func readSnapshots(f File, h *Header) (all []Snapshot, n int64, err error) {
	bad := func(i int, what string) error {
		return damaged(f, "snapshot %d of %d: %s", i+1, h.Snapshots, what)
	}
	be := binary.BigEndian
	at := h.SnapshotsOffset
	for i := range h.Snapshots {
		var fixed [40]byte
		if at > f.Length()-int64(len(fixed)) {
			return nil, 0, bad(i, "it lies past the end of the file")
		}
		if err := f.ReadAt(fixed[:], at); err != nil {
			return nil, 0, err
		}
		id, name, extra := int(be.Uint16(fixed[12:])), int(be.Uint16(fixed[14:])), int64(be.Uint32(fixed[36:]))
		if extra > maxSnapshotExtra {
			return nil, 0, bad(i, fmt.Sprintf("it has %d bytes of unknown extra data", extra))
		}
		rest := make([]byte, extra+int64(id)+int64(name))
		if at+int64(len(fixed)) > f.Length()-int64(len(rest)) {
			return nil, 0, bad(i, "it is cut off")
		}
		if err := f.ReadAt(rest, at+int64(len(fixed))); err != nil {
			return nil, 0, err
		}
		s := Snapshot{
			L1Offset:  int64(be.Uint64(fixed[0:])),
			L1Entries: int(be.Uint32(fixed[8:])),
			Date:      time.Unix(int64(be.Uint32(fixed[16:])), int64(be.Uint32(fixed[20:]))),
			VMClock:   time.Duration(be.Uint64(fixed[24:])),
			StateSize: int64(be.Uint32(fixed[32:])),
			Icount:    -1,
			Size:      h.Size,
			ID:        string(rest[extra:][:id]),
			Name:      string(rest[extra:][id:]),
			at:        at,
			extra:     extra,
		}
		if extra >= 8 {
			s.StateSize = int64(be.Uint64(rest))
		}
		if extra >= 16 {
			s.Size = int64(be.Uint64(rest[8:]))
		}
		if extra >= 24 {
			s.Icount = int64(be.Uint64(rest[16:]))
		}
		all = append(all, s)
		at += int64(len(fixed) + len(rest))
		n = at - h.SnapshotsOffset
		at = (at + 7) &^ 7
		if n > maxSnapshotTable {
			return nil, 0, bad(i, "the table of snapshots is too large")
		}
	}
	return all, n, nil
}

// snapshotFault says why a snapshot's disk cannot be read, "" if it can.
func (g Geometry) snapshotFault(s *Snapshot) string {
	switch {
	case s.Size < 0 || s.Size > 1<<63-1-g.ClusterSize():
		return fmt.Sprintf("a disk of %d bytes is not possible", s.Size)
	case s.L1Entries > maxL1Size/8:
		return fmt.Sprintf("an L1 table of %d entries is too large", s.L1Entries)
	case int64(s.L1Entries) < g.L1Needed(s.Size):
		return fmt.Sprintf("its L1 table has %d entries, and a disk of %d bytes needs %d", s.L1Entries, s.Size, g.L1Needed(s.Size))
	case s.L1Entries > 0 && !g.tableOK(s.L1Offset):
		return fmt.Sprintf("the offset of its L1 table, %#x, is not the beginning of a cluster", uint64(s.L1Offset))
	}
	return ""
}

// Snapshot is the disk of an internal snapshot, for reading only, by its ID or
// its name.
func (im *Image) Snapshot(name string) (*Image, error) {
	all, err := Snapshots(im.f, im.h)
	if err != nil {
		return nil, err
	}
	var found *Snapshot
	for i := range all {
		if all[i].ID == name {
			found = &all[i]
			break
		}
		if all[i].Name == name && found == nil {
			found = &all[i]
		}
	}
	if found == nil {
		return nil, im.missing("snapshot", name)
	}
	if what := im.g.snapshotFault(found); what != "" {
		return nil, im.damaged("snapshot %q: %s", name, what)
	}
	s, err := newImage(im.f, im.h, found.L1Offset, found.L1Entries, im.opts)
	if err != nil {
		return nil, err
	}
	s.h.Size = found.Size
	s.h.Bitmaps = nil // they are of the active disk
	return s, nil
}
