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
	PathLost       string        `json:"x-path-lost,omitempty"` // as ImageStatus.PathLost
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
	BackingImage  *imageInfo      `json:"backing-image,omitempty"`
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
	DataFileRaw   *bool  `json:"data-file-raw,omitempty"`
	ExtendedL2    *bool  `json:"extended-l2,omitempty"` // these are nil for version 2
	LazyRefcounts *bool  `json:"lazy-refcounts,omitempty"`
	Corrupt       *bool  `json:"corrupt,omitempty"`
	RefcountBits  int    `json:"refcount-bits"`
	Compression   string `json:"compression-type"`
}

// newImageInfo describes an image, and those behind it unless flat.
func newImageInfo(l backend.Layer, flat bool) imageInfo {
	i := imageInfo{Filename: l.Path, Format: l.Format, VirtualSize: l.Size}
	q := l.Qcow2
	if q == nil {
		return i
	}
	i.ClusterSize, i.DirtyFlag = q.ClusterSize, q.Dirty
	if len(q.Behind) > 0 {
		i.Backing, i.FullBacking, i.BackingFormat = q.Backing, q.Behind[0].Path, q.BackingFormat
		if !flat {
			behind := newImageInfo(q.Behind[0], false)
			i.BackingImage = &behind
		}
	}
	data := qcow2Specific{
		Compat: "1.1", DataFile: q.DataFile, ExtendedL2: &q.ExtendedL2,
		LazyRefcounts: &q.LazyRefcounts, Corrupt: &q.Corrupt, RefcountBits: q.RefcountBits, Compression: q.Compression,
	}
	if q.Version == 2 {
		data = qcow2Specific{Compat: "0.10", RefcountBits: q.RefcountBits, Compression: q.Compression}
	}
	if q.DataFile != "" {
		data.DataFileRaw = &q.DataFileRaw
	}
	i.Specific = &formatSpecific{"qcow2", data}
	return i
}

// fileLayer is the file that l is in.
func fileLayer(l backend.Layer) backend.Layer {
	f := backend.Layer{Path: l.Path, Format: "file", Size: l.FileSize}
	if l.Device {
		f.Format = "host_device"
	}
	return f
}

// hostImage is the part of an image that tells of its files; *backend.Owned is
// one.
type hostImage interface {
	FileSize() int64
	Qcow2() (backend.QcowInfo, bool)
}

// nodeLister makes the list of query-named-block-nodes. With flat, nodes say
// nothing of what is behind them, which are nodes of their own.
type nodeLister struct {
	registry *Registry
	flat     bool
	list     []blockDevice
}

// add lists a node. like has what the nodes of an image have in common.
func (n *nodeLister) add(like blockDevice, name string, l backend.Layer, readOnly bool) {
	d := like
	d.NodeName, d.File, d.Drv, d.RO, d.Image = name, l.Path, l.Format, readOnly, newImageInfo(l, n.flat)
	if q := l.Qcow2; q != nil && len(q.Behind) > 0 {
		d.BackingFile = q.Behind[0].Path
		if !n.flat {
			d.BackingDepth = len(q.Behind)
		}
	}
	n.list = append(n.list, d)
}

// addTarget lists the nodes of an image.
func (n *nodeLister) addTarget(t *Target) {
	info := t.Image.Info()
	format, file := t.active()
	like := blockDevice{Active: format, DetectZeroes: "off", Cache: blockCache{Writeback: !info.WriteThrough}}
	layer := backend.Layer{Path: info.Path, Size: t.Image.Size()}
	layer.FileSize = layer.Size
	if img, ok := t.Image.(hostImage); ok {
		layer.FileSize = img.FileSize()
		if q, ok := img.Qcow2(); ok {
			layer.Qcow2 = &q
		}
	}
	for _, x := range t.nodes() {
		d, l := like, layer
		if t.PathLost != nil {
			d.PathLost = t.PathLost()
		}
		if d.Cache.Direct = x.direct; x == t.file {
			d.Active, l = file, fileLayer(layer)
		} else {
			d.DirtyBitmaps = t.dirtyBitmaps()
		}
		l.Format = x.driver
		n.add(d, x.name, l, x.readOnly)
	}
	if t.format != nil && layer.Qcow2 != nil {
		like.Cache.Direct = t.format.direct
		n.addBelow(t, like, layer.Qcow2)
	}
}

// addBelow lists what a qcow2 image leads to.
func (n *nodeLister) addBelow(t *Target, like blockDevice, q *backend.QcowInfo) {
	add := func(l backend.Layer, readOnly bool) {
		n.add(like, n.registry.nameBelow(t, l.Format+":"+l.Path), l, readOnly)
	}
	data := func(q *backend.QcowInfo, readOnly bool) {
		if q != nil && q.Data.Path != "" {
			add(fileLayer(q.Data), readOnly)
		}
	}
	data(q, t.format.readOnly)
	for _, l := range q.Behind {
		add(l, true)
		add(fileLayer(l), true)
		data(l.Qcow2, true)
	}
}

func (s *session) queryNodes(a args) (any, error) {
	r := s.server.cfg.Registry
	n := nodeLister{registry: r, flat: arg[bool](a, "flat"), list: []blockDevice{}}
	for _, t := range r.Targets() {
		n.addTarget(t)
	}
	return n.list, nil
}
