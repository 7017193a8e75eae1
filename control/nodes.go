package control

import (
	"github.com/nbd-export/nbd-export/backend"
)

// blockNode is a node of the graph. It does not change once it is known.
type blockNode struct {
	name   string
	driver string
	// implicit: it came inside the definition of the node above, and goes
	// with that.
	implicit                            bool
	readOnly, forceShare, direct, unmap bool
	filename, ownerRecord               string // of a file node
	locking                             backend.LockingMode
	dropCache                           backend.DropCacheMode
	l2Cache                             int64 // of a qcow2 node, bytes; 0 for the default
	noBacking                           bool
	// active is what was asked for when it was added.
	active bool
}

// checkNodeName holds a name to QEMU's rules (id_wellformed, bdrv_assign_node_name).
func checkNodeName(name string) error {
	switch {
	case !wellFormed(name):
		return generic("Invalid node-name: '%s'", name)
	case len(name) > 31:
		return generic("Node name too long")
	}
	return nil
}

// wellFormed is QEMU's id_wellformed: a letter, then letters, digits, "-._".
func wellFormed(id string) bool {
	for i, c := range []byte(id) {
		letter := 'a' <= c|0x20 && c|0x20 <= 'z'
		if !letter && (i == 0 || !digit(c) && c != '-' && c != '.' && c != '_') {
			return false
		}
	}
	return id != ""
}

// blockDevice is QEMU's BlockDeviceInfo.
type blockDevice struct {
	NodeName       string        `json:"node-name"`
	File           string        `json:"file"`
	RO             bool          `json:"ro"`
	Drv            string        `json:"drv"`
	BackingFile    string        `json:"backing_file,omitempty"`
	BackingDepth   int           `json:"backing_file_depth"`
	Active         bool          `json:"active"`
	Encrypted      bool          `json:"encrypted"`
	DetectZeroes   string        `json:"detect_zeroes"`
	Bps            int           `json:"bps"`
	BpsRd          int           `json:"bps_rd"`
	BpsWr          int           `json:"bps_wr"`
	Iops           int           `json:"iops"`
	IopsRd         int           `json:"iops_rd"`
	IopsWr         int           `json:"iops_wr"`
	Image          imageInfo     `json:"image"`
	Cache          blockCache    `json:"cache"`
	WriteThreshold int           `json:"write_threshold"`
	DirtyBitmaps   []dirtyBitmap `json:"dirty-bitmaps,omitempty"`
}

type blockCache struct {
	Writeback bool `json:"writeback"`
	Direct    bool `json:"direct"`
	NoFlush   bool `json:"no-flush"`
}

// imageInfo is QEMU's ImageInfo.
type imageInfo struct {
	Filename      string          `json:"filename"`
	Format        string          `json:"format"`
	VirtualSize   int64           `json:"virtual-size"`
	DirtyFlag     bool            `json:"dirty-flag"`
	ClusterSize   int64           `json:"cluster-size,omitempty"`
	Backing       string          `json:"backing-filename,omitempty"`
	FullBacking   string          `json:"full-backing-filename,omitempty"`
	BackingFormat string          `json:"backing-filename-format,omitempty"`
	Specific      *formatSpecific `json:"format-specific,omitempty"`
}

// formatSpecific is QEMU's ImageInfoSpecific of a qcow2 image.
type formatSpecific struct {
	Type string        `json:"type"`
	Data qcow2Specific `json:"data"`
}

type qcow2Specific struct {
	Compat        string `json:"compat"`
	DataFile      string `json:"data-file,omitempty"`
	DataFileRaw   bool   `json:"data-file-raw,omitempty"`
	ExtendedL2    bool   `json:"extended-l2"`
	LazyRefcounts bool   `json:"lazy-refcounts"`
	Corrupt       bool   `json:"corrupt"`
	RefcountBits  int    `json:"refcount-bits"`
	Compression   string `json:"compression-type"`
}

// hostImage is the part of an image that tells of its files; *backend.Owned is
// one.
type hostImage interface {
	FileSize() int64
	Qcow2() (backend.QcowInfo, bool)
}

// layers tells the size of a file node from that of a format node, and adds what
// is known of that.
func (d *blockDevice) layers(img hostImage, file bool) {
	if file {
		d.Image.VirtualSize = img.FileSize()
	} else if q, ok := img.Qcow2(); ok {
		d.describe(q)
	}
}

// describe adds what is in a qcow2 image's header.
func (d *blockDevice) describe(q backend.QcowInfo) {
	i := &d.Image
	i.ClusterSize, i.DirtyFlag = q.ClusterSize, q.Dirty
	if d.BackingDepth = len(q.Chain); d.BackingDepth > 0 {
		d.BackingFile = q.Chain[0]
		i.Backing, i.FullBacking, i.BackingFormat = q.Backing, q.Chain[0], q.BackingFormat
	}
	data := qcow2Specific{
		Compat: "1.1", DataFile: q.DataFile, DataFileRaw: q.DataFileRaw, ExtendedL2: q.ExtendedL2,
		LazyRefcounts: q.LazyRefcounts, Corrupt: q.Corrupt, RefcountBits: q.RefcountBits, Compression: q.Compression,
	}
	if q.Version == 2 {
		data.Compat = "0.10"
	}
	i.Specific = &formatSpecific{"qcow2", data}
}

func (s *session) queryNodes(args) (any, error) {
	list := []blockDevice{}
	for _, t := range s.server.cfg.Registry.Targets() {
		info, size := t.Image.Info(), t.Image.Size()
		format, file := t.active()
		for _, n := range t.nodes() {
			d := blockDevice{
				NodeName: n.name, File: info.Path, Drv: n.driver, RO: n.readOnly, Active: format, DetectZeroes: "off",
				Image: imageInfo{Filename: info.Path, Format: n.driver, VirtualSize: size},
				Cache: blockCache{Writeback: !info.WriteThrough, Direct: n.direct},
			}
			if n == t.file {
				d.Active = file
			} else {
				d.DirtyBitmaps = t.dirtyBitmaps()
			}
			if img, ok := t.Image.(hostImage); ok {
				d.layers(img, n == t.file)
			}
			list = append(list, d)
		}
	}
	return list, nil
}
