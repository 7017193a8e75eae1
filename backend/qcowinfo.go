package backend

import (
	"slices"

	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// QcowInfo is what the header of a qcow2 image says.
type QcowInfo struct {
	Version, RefcountBits                                  int
	ClusterSize                                            int64  // bytes
	Compression                                            string // "zlib" or "zstd"
	Dirty, Corrupt, LazyRefcounts, ExtendedL2, DataFileRaw bool
	DataFile, Backing, BackingFormat                       string  // as recorded, "" for none
	Data                                                   Layer   // what is open as its data file, without a path if it has none
	Behind                                                 []Layer // the backing files that are open, in their order
}

// Layer is an image that another leads to, as it was opened.
type Layer struct {
	Path     string
	Format   string // "raw" or "qcow2"
	Device   bool   // its file is a block device
	Size     int64  // of the disk, bytes
	FileSize int64
	Qcow2    *QcowInfo // nil of a raw image
}

// newLayers describes a chain.
func newLayers(links []*Link) []Layer {
	all := make([]Layer, len(links))
	for i, l := range slices.Backward(links) {
		all[i] = Layer{Path: l.Path, Format: l.Format, Device: l.File.traits.BlockDevice, Size: l.File.Length(), FileSize: l.File.Length()}
		if l.Header == nil {
			continue
		}
		info := newQcowInfo(l.Header)
		info.Behind = all[i+1:]
		if l.Data != nil {
			info.Data = Layer{Path: l.DataPath, Format: "raw", Device: l.Data.traits.BlockDevice, Size: l.Header.Size, FileSize: l.Data.Length()}
		}
		all[i].Size, all[i].Qcow2 = l.Header.Size, &info
	}
	return all
}

func newQcowInfo(h *qcow2.Header) QcowInfo {
	i := QcowInfo{
		Version: h.Version, RefcountBits: 1 << h.RefcountOrder,
		ClusterSize: h.Geometry().ClusterSize(), Compression: "zlib",
		Dirty: h.Incompatible&qcow2.Dirty != 0, Corrupt: h.Incompatible&qcow2.Corrupt != 0,
		LazyRefcounts: h.Compatible&qcow2.LazyRefcounts != 0, ExtendedL2: h.Incompatible&qcow2.ExtendedL2 != 0,
		DataFileRaw: h.Autoclear&qcow2.DataFileRaw != 0,
		DataFile:    h.DataFileName, Backing: h.Backing, BackingFormat: h.BackingFormat,
	}
	if h.CompressionType == qcow2.Zstd {
		i.Compression = "zstd"
	}
	return i
}

// Qcow2 describes the image as it was opened or last activated, if it is a qcow2
// image. It never waits; what it returns is not to be changed.
func (o *Owned) Qcow2() (QcowInfo, bool) {
	q, ok := o.cur.Load().content.(*qcow)
	if !ok {
		return QcowInfo{}, false
	}
	i := q.about
	if i.Data.Path != "" {
		i.Data.FileSize = q.all[1].Length() // which the disk may have made longer
	}
	return i, true
}

// FileSize is the length in bytes of the file that Options.Path names. It never
// waits.
func (o *Owned) FileSize() int64 { return o.cur.Load().file.Length() }
