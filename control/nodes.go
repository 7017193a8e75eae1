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
	NodeName       string     `json:"node-name"`
	File           string     `json:"file"`
	RO             bool       `json:"ro"`
	Drv            string     `json:"drv"`
	BackingDepth   int        `json:"backing_file_depth"`
	Active         bool       `json:"active"`
	Encrypted      bool       `json:"encrypted"`
	DetectZeroes   string     `json:"detect_zeroes"`
	Bps            int        `json:"bps"`
	BpsRd          int        `json:"bps_rd"`
	BpsWr          int        `json:"bps_wr"`
	Iops           int        `json:"iops"`
	IopsRd         int        `json:"iops_rd"`
	IopsWr         int        `json:"iops_wr"`
	Image          imageInfo  `json:"image"`
	Cache          blockCache `json:"cache"`
	WriteThreshold int        `json:"write_threshold"`
}

type blockCache struct {
	Writeback bool `json:"writeback"`
	Direct    bool `json:"direct"`
	NoFlush   bool `json:"no-flush"`
}

// imageInfo is QEMU's ImageInfo.
type imageInfo struct {
	Filename    string `json:"filename"`
	Format      string `json:"format"`
	VirtualSize int64  `json:"virtual-size"`
	DirtyFlag   bool   `json:"dirty-flag"`
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
			}
			list = append(list, d)
		}
	}
	return list, nil
}
