package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/backend/qcow2"
)

func newInfoCommand() *cobra.Command {
	var asJSON, chain bool
	var ownerRecord string
	var allow []string
	format := choose("auto", "raw", "qcow2")
	cmd := &cobra.Command{
		Use:   "info [flags] IMAGE",
		Short: "Show what an image is, and who owns it",
		Long: `Show what an image is: its format, sizes, features, snapshots and bitmaps, as
qemu-img info does, and who owns it, as who does. It takes no lock and changes
nothing, so an image that is being written may show itself half changed.

In JSON, members that qemu-img info has have its names; owner is what who --json
prints. With --backing-chain it is an array, the image itself first.`,
		Example: `  nbd-export info disk.qcow2
  nbd-export info --backing-chain overlay.qcow2
  nbd-export info --json disk.qcow2 | jq '."virtual-size"'`,
		Args: oneArg("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("owner-record") && ownerRecord == "" {
				return usageError{errors.New("info: --owner-record needs a path, or off")}
			}
			all, err := describe(args[0], format.value, chain, allow)
			if err != nil {
				return err
			}
			seen, err := backend.Who(args[0], ownerRecord)
			if err != nil {
				return err
			}
			w := judge(args[0], seen, time.Now())
			all[0].Owner = &w
			switch {
			case asJSON && chain:
				return writeJSON(cmd.OutOrStdout(), all)
			case asJSON:
				return writeJSON(cmd.OutOrStdout(), all[0])
			}
			for i := range all {
				if i > 0 {
					_, _ = fmt.Fprintln(cmd.OutOrStdout())
				}
				if err := all[i].write(cmd.OutOrStdout()); err != nil {
					return err
				}
			}
			return nil
		},
	}
	format.addTo(cmd, "format", "f", "of the image")
	forceShareFlag(cmd, new(bool), "take no lock, as it never does; for scripts that say so to qemu-img")
	jsonFlag(cmd, &asJSON)
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "also show the images behind it")
	allowBackingFlag(cmd, &allow)
	ownerRecordFlag(cmd, &ownerRecord)
	return cmd
}

func allowBackingFlag(cmd *cobra.Command, dirs *[]string) {
	cmd.Flags().StringArrayVar(dirs, "allow-backing", nil, "backing and data files of qcow2 images may also be in `DIR`, beside the image's own directory")
	_ = cmd.MarkFlagDirname("allow-backing")
}

// describe opens an image, and with chain what is behind it.
func describe(path, format string, chain bool, allow []string) ([]imageInfo, error) {
	o := backend.ChainOptions{AllowBacking: allow}
	if !chain {
		link, err := backend.OpenLink(path, format, o)
		if err != nil {
			return nil, err
		}
		defer link.Close()
		i, err := describeLink(link)
		return []imageInfo{i}, err
	}
	c, err := backend.OpenChain(path, format, o)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	var all []imageInfo
	for _, link := range c.Links {
		i, err := describeLink(link)
		if err != nil {
			return nil, err
		}
		all = append(all, i)
	}
	return all, nil
}

// imageInfo is what is printed.
type imageInfo struct {
	Filename      string         `json:"filename"`
	Format        string         `json:"format"`
	VirtualSize   int64          `json:"virtual-size"` // bytes, like all sizes
	ActualSize    int64          `json:"actual-size"`  // space taken on the host
	FileLength    int64          `json:"file-length"`
	ClusterSize   int64          `json:"cluster-size,omitempty"`
	Dirty         bool           `json:"dirty-flag"`
	Backing       string         `json:"backing-filename,omitempty"`
	FullBacking   string         `json:"full-backing-filename,omitempty"`
	BackingFormat string         `json:"backing-filename-format,omitempty"`
	Snapshots     []snapshotInfo `json:"snapshots,omitempty"`
	Specific      *specificInfo  `json:"format-specific,omitempty"`
	// Damage says what of it could not be read.
	Damage []string `json:"damage,omitempty"`
	Owner  *who     `json:"owner,omitempty"`
}

type specificInfo struct {
	Type string    `json:"type"`
	Data qcow2Info `json:"data"`
}

// qcow2Info has nil where version 2 of the format has nothing.
type qcow2Info struct {
	Compat          string       `json:"compat"`
	CompressionType string       `json:"compression-type"`
	LazyRefcounts   *bool        `json:"lazy-refcounts,omitempty"`
	Bitmaps         []bitmapInfo `json:"bitmaps,omitempty"`
	RefcountBits    int          `json:"refcount-bits"`
	DataFile        string       `json:"data-file,omitempty"`
	DataFileRaw     *bool        `json:"data-file-raw,omitempty"`
	Corrupt         *bool        `json:"corrupt,omitempty"`
	ExtendedL2      *bool        `json:"extended-l2,omitempty"`
}

type snapshotInfo struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	StateSize   int64  `json:"vm-state-size"`
	DateSec     int64  `json:"date-sec"`
	DateNsec    int64  `json:"date-nsec"`
	VMClockSec  int64  `json:"vm-clock-sec"`
	VMClockNsec int64  `json:"vm-clock-nsec"`
	Icount      *int64 `json:"icount,omitempty"`
}

type bitmapInfo struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"` // bytes
	Flags       []string `json:"flags"`
}

func describeLink(link *backend.Link) (imageInfo, error) {
	f, h := link.File, link.Header
	i := imageInfo{Filename: link.Path, Format: link.Format, VirtualSize: f.Length(), FileLength: f.Length()}
	var err error
	if i.ActualSize, err = f.Allocated(); err != nil || h == nil {
		return i, err
	}
	i.VirtualSize, i.ClusterSize = h.Size, h.Geometry().ClusterSize()
	i.Dirty = h.Incompatible&qcow2.Dirty != 0
	i.Backing, i.FullBacking, i.BackingFormat = h.Backing, besideImage(link.Path, h.Backing), h.BackingFormat
	// Damage there hides nothing of what is fine.
	note := func(err error) error {
		if _, ok := errors.AsType[*qcow2.FormatError](err); ok {
			i.Damage = append(i.Damage, err.Error())
			return nil
		}
		return err
	}
	snapshots, err := qcow2.Snapshots(f, h)
	if err := note(err); err != nil {
		return i, err
	}
	for _, s := range snapshots {
		n := snapshotInfo{
			ID: s.ID, Name: s.Name, StateSize: s.StateSize, DateSec: s.Date.Unix(), DateNsec: int64(s.Date.Nanosecond()),
			VMClockSec: int64(s.VMClock / time.Second), VMClockNsec: int64(s.VMClock % time.Second),
		}
		if s.Icount >= 0 {
			n.Icount = &s.Icount
		}
		i.Snapshots = append(i.Snapshots, n)
	}
	d := qcow2Info{Compat: "0.10", CompressionType: [...]string{"zlib", "zstd"}[h.CompressionType], RefcountBits: 1 << h.RefcountOrder}
	if h.Version >= 3 {
		bit := func(features, bit uint64) *bool { return new(features&bit != 0) }
		d.Compat = "1.1"
		d.LazyRefcounts = bit(h.Compatible, qcow2.LazyRefcounts)
		d.Corrupt = bit(h.Incompatible, qcow2.Corrupt)
		d.ExtendedL2 = bit(h.Incompatible, qcow2.ExtendedL2)
		if h.Incompatible&qcow2.DataFile != 0 {
			d.DataFile, d.DataFileRaw = h.DataFileName, bit(h.Autoclear, qcow2.DataFileRaw)
		}
	}
	if h.Autoclear&qcow2.BitmapsConsistent != 0 {
		bitmaps, err := qcow2.Bitmaps(f, h)
		if err := note(err); err != nil {
			return i, err
		}
		for _, b := range bitmaps {
			n := bitmapInfo{Name: b.Name, Granularity: 1 << b.Granularity, Flags: []string{}}
			if b.InUse {
				n.Flags = append(n.Flags, "in-use")
			}
			if b.Auto {
				n.Flags = append(n.Flags, "auto")
			}
			d.Bitmaps = append(d.Bitmaps, n)
		}
	}
	i.Specific = &specificInfo{"qcow2", d}
	return i, nil
}

// besideImage is where a name that an image records leads, for people.
func besideImage(image, name string) string {
	slash := strings.LastIndexByte(image, '/')
	if name == "" || name[0] == '/' || slash < 0 || strings.Contains(strings.SplitN(name, "/", 2)[0], ":") {
		return name
	}
	return image[:slash+1] + name
}

// write prints i for people.
func (i *imageInfo) write(out io.Writer) error {
	var b strings.Builder
	row := func(indent int, name, format string, a ...any) {
		text := name + ": " + fmt.Sprintf(format, a...)
		fmt.Fprintf(&b, "%s%s\n", strings.Repeat("    ", indent), backend.Printable(text))
	}
	row(0, "image", "%s", i.Filename)
	row(0, "file format", "%s", i.Format)
	row(0, "virtual size", "%s (%d bytes)", sizeText(i.VirtualSize), i.VirtualSize)
	row(0, "disk size", "%s", sizeText(i.ActualSize))
	row(0, "file length", "%s (%d bytes)", sizeText(i.FileLength), i.FileLength)
	if i.ClusterSize > 0 {
		row(0, "cluster_size", "%d", i.ClusterSize)
	}
	if i.Dirty {
		row(0, "cleanly shut down", "no")
	}
	if i.Backing != "" {
		actual := ""
		if i.FullBacking != i.Backing {
			actual = fmt.Sprintf(" (actual path: %s)", i.FullBacking)
		}
		row(0, "backing file", "%s%s", i.Backing, actual)
		if i.BackingFormat != "" {
			row(0, "backing file format", "%s", i.BackingFormat)
		}
	}
	if len(i.Snapshots) > 0 {
		b.WriteString("Snapshot list:\n")
		fmt.Fprintf(&b, "%-7s %-16s %8s %19s %15s %10s\n", "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
		for _, s := range i.Snapshots {
			clock, icount := s.VMClockSec, ""
			if s.Icount != nil {
				icount = fmt.Sprint(*s.Icount)
			}
			fmt.Fprintf(&b, "%-7s %-16s %8s %19s %15s %10s\n", backend.Printable(s.ID), backend.Printable(s.Name), sizeText(s.StateSize),
				time.Unix(s.DateSec, 0).Format(time.DateTime),
				fmt.Sprintf("%04d:%02d:%02d.%03d", clock/3600, clock/60%60, clock%60, s.VMClockNsec/1e6), icount)
		}
	}
	if i.Specific != nil {
		b.WriteString("Format specific information:\n")
		i.Specific.Data.write(&b, row)
	}
	for _, d := range i.Damage {
		row(0, "damage", "%s", d)
	}
	if w := i.Owner; w != nil {
		row(0, "owner", "%s", w.Verdict)
		row(0, "locks", "%s (%s)", w.Locks.Held, w.Locks.Scope)
		row(0, "owner record", "%s", recordText(w.Place))
		if w.Record != nil {
			row(0, "epoch", "%d", w.Record.Epoch)
		}
		if w.Error != "" {
			row(0, "error", "%s", w.Error)
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func (d *qcow2Info) write(b *strings.Builder, row func(indent int, name, format string, a ...any)) {
	flag := func(name string, v *bool) {
		if v != nil {
			row(1, name, "%t", *v)
		}
	}
	row(1, "compat", "%s", d.Compat)
	row(1, "compression type", "%s", d.CompressionType)
	flag("lazy refcounts", d.LazyRefcounts)
	if len(d.Bitmaps) > 0 {
		b.WriteString("    bitmaps:\n")
		for _, m := range d.Bitmaps {
			row(2, m.Name, "granularity %s, %s", sizeText(m.Granularity), strings.Join(append([]string{"flags"}, m.Flags...), " "))
		}
	}
	row(1, "refcount bits", "%d", d.RefcountBits)
	if d.DataFile != "" {
		row(1, "data file", "%s", d.DataFile)
	}
	flag("data file raw", d.DataFileRaw)
	flag("corrupt", d.Corrupt)
	flag("extended l2", d.ExtendedL2)
}

// sizeText is a size as qemu-img prints it: three digits and a power of 1024.
func sizeText(n int64) string {
	_, exp := math.Frexp(float64(n) / (1000.0 / 1024.0))
	i := max(exp-1, 0) / 10
	return fmt.Sprintf("%.3g %sB", float64(n)/float64(int64(1)<<(10*i)), [...]string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}[i])
}
