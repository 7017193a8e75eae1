package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/backend/qcow2"
	"github.com/nbd-export/nbd-export/internal/bytesize"
)

func newCreateCommand() *cobra.Command {
	format, backingFormat := choose("qcow2", "raw"), &choice{words: []string{"raw", "qcow2"}}
	var backing string
	var unsafe bool
	var options []string
	cmd := &cobra.Command{
		Use:   "create [flags] IMAGE [SIZE]",
		Short: "Make a new image",
		Long: `Make a new image. What is there already is never overwritten, and what a failure
or a crash leaves is no image. SIZE is in bytes, or in k, M, G or T, which are powers
of 1024, as 1.5G; with a backing file it may be left out, and is then as large as
that.

A relative name of a backing file, or of a data file, is looked for beside the
image. (QEMU looks for a data file's in its working directory.)

Options (-o), as of qemu-img; -o help lists them too. A raw image takes the first
two.
` + createOptionsHelp + `In NAME a comma is written twice.`,
		Example: `  nbd-export create disk.qcow2 20G
  nbd-export create -o cluster_size=128k,extended_l2=on disk.qcow2 1T
  nbd-export create -b base.qcow2 -F qcow2 overlay.qcow2
  nbd-export create -o preallocation=falloc disk.qcow2 20G
  nbd-export create -f raw disk.img 10G`,
		Args: func(cmd *cobra.Command, args []string) error {
			if wantsOptionsHelp(options) {
				return nil
			}
			if len(args) == 0 || args[0] == "" || len(args) > 2 {
				return errors.New("create needs one or two arguments, IMAGE and SIZE")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if wantsOptionsHelp(options) {
				_, err := fmt.Fprint(cmd.OutOrStdout(), createOptionsHelp)
				return err
			}
			wrong := func(err error) error { return usageError{fmt.Errorf("create: %w", err)} }
			if err := needPaths(cmd, "backing"); err != nil {
				return err
			}
			o, err := createOptions(options, qcow2.CreateOptions{Size: -1, Backing: backing, BackingFormat: backingFormat.value})
			if err != nil {
				return wrong(err)
			}
			size := o.Size
			if len(args) == 2 {
				if size >= 0 {
					return wrong(errors.New("the size is given twice, as SIZE and as -o size="))
				}
				if size, err = bytesize.Parse(args[1]); err != nil {
					return wrong(err)
				}
			}
			raw := format.value == "raw"
			switch {
			case raw && o != (qcow2.CreateOptions{Size: o.Size, Preallocation: o.Preallocation}):
				return wrong(errors.New("-b, -F and most of -o are for qcow2; a raw image has none of that"))
			case (o.Backing == "") != (o.BackingFormat == ""):
				return wrong(errors.New("-b and -F go together: the format of a backing file is recorded, and never guessed"))
			case o.Backing != "" && !unsafe:
				virtual, err := backingSize(args[0], o.Backing, o.BackingFormat)
				if err != nil {
					return err
				}
				if size < 0 {
					size = virtual
				}
			case size < 0:
				return wrong(errors.New("it needs a SIZE"))
			}
			o.Size = size
			if raw {
				err = backend.CreateRaw(args[0], size, o.Preallocation)
			} else {
				err = backend.CreateQcow2(args[0], o)
			}
			if _, ok := errors.AsType[*qcow2.OptionError](err); ok {
				return wrong(err)
			}
			return err
		},
	}
	f := cmd.Flags()
	format.addTo(cmd, "format", "f", "of the new image")
	f.StringVarP(&backing, "backing", "b", "", "what is not written shows the image at `PATH`")
	backingFormat.addTo(cmd, "backing-format", "F", "of the image that -b names")
	f.BoolVarP(&unsafe, "backing-unsafe", "u", false, "do not look at the backing file, which need not be there")
	f.StringArrayVarP(&options, "options", "o", nil, "`NAME=VALUE,...`, as above; may be repeated")
	_ = cmd.MarkFlagFilename("backing")
	return cmd
}

// createOptionsHelp are the options of -o, a line each.
const createOptionsHelp = `  size=SIZE               the same as the argument SIZE
  preallocation=MODE      off; metadata: clusters have their places; falloc: and their
                          space on the host; full: and are written, with zeros (off)
  cluster_size=SIZE       512 to 2M, a power of two (64k)
  refcount_bits=N         1 to 64, a power of two (16)
  lazy_refcounts=on|off   refcounts may be written later (off)
  extended_l2=on|off      clusters have 32 parts that are allocated one by one (off)
  compression_type=TYPE   of clusters that get compressed: zlib, zstd (zlib)
  data_file=NAME          the disk's bytes are in a file of their own, which is made too
  data_file_raw=on|off    and that is readable as a raw image (off)
  backing_file=NAME       the same as -b
  backing_fmt=FORMAT      the same as -F
  compat=VERSION          0.10, for QEMU before 1.1, or 1.1 (1.1)
`

// wantsOptionsHelp reports whether the values of -o ask for the list of options.
func wantsOptionsHelp(texts []string) bool {
	return slices.ContainsFunc(texts, func(text string) bool { return text == "help" || text == "?" })
}

// createOptions decodes the values of -o into o.
func createOptions(texts []string, o qcow2.CreateOptions) (qcow2.CreateOptions, error) {
	for _, text := range texts {
		// A comma that is part of a value is doubled.
		for pair := range strings.SplitSeq(strings.ReplaceAll(text, ",,", "\x00"), ",") {
			pair = strings.ReplaceAll(pair, "\x00", ",")
			name, value, ok := strings.Cut(pair, "=")
			if !ok || value == "" {
				return o, fmt.Errorf("-o %q: want NAME=VALUE", pair)
			}
			if err := createOption(&o, name, value); err != nil {
				return o, fmt.Errorf("-o %s: %w", pair, err)
			}
		}
	}
	return o, nil
}

func createOption(o *qcow2.CreateOptions, name, value string) (err error) {
	// one finds a value among words, which come in the order of their numbers.
	one := func(words ...string) int {
		for i, w := range words {
			if value == w {
				return i
			}
		}
		err = fmt.Errorf("must be one of %s", strings.Join(words, ", "))
		return 0
	}
	switch name {
	case "size":
		o.Size, err = bytesize.Parse(value)
	case "preallocation":
		o.Preallocation = qcow2.Preallocation(one("off", "metadata", "falloc", "full"))
	case "cluster_size":
		o.ClusterSize, err = bytesize.Parse(value)
		if err == nil && o.ClusterSize == 0 {
			err = errors.New("must be a power of two from 512 to 2M")
		}
	case "refcount_bits":
		o.RefcountBits, err = strconv.Atoi(value)
		if err != nil || o.RefcountBits == 0 {
			err = errors.New("must be a power of two from 1 to 64")
		}
	case "lazy_refcounts":
		o.LazyRefcounts = one("off", "on") == 1
	case "extended_l2":
		o.ExtendedL2 = one("off", "on") == 1
	case "compression_type":
		o.CompressionType = uint8(one("zlib", "zstd"))
	case "data_file":
		o.DataFile = value
	case "data_file_raw":
		o.DataFileRaw = one("off", "on") == 1
	case "backing_file":
		if o.Backing != "" && o.Backing != value {
			return errors.New("another one is given with -b")
		}
		o.Backing = value
	case "backing_fmt":
		if o.BackingFormat != "" && o.BackingFormat != value {
			return errors.New("another one is given with -F")
		}
		o.BackingFormat = []string{"raw", "qcow2"}[one("raw", "qcow2")]
	case "compat":
		o.Version = one("0.10", "1.1", "v2", "v3")&1 + 2
	default:
		if name == "encryption" || strings.HasPrefix(name, "encrypt.") {
			return errors.New("nbd-export makes no encrypted images, and serves none; qemu-img does, and qemu-nbd")
		}
		err = errors.New("there is no such option; -o help lists them")
	}
	return err
}

// backingSize opens the image that one to be made names, as it will be looked
// for, and returns the size of its disk.
func backingSize(image, backing, format string) (int64, error) {
	link, err := backend.OpenLink(besideImage(image, backing), format, backend.ChainOptions{})
	if err != nil {
		return 0, err
	}
	defer link.Close()
	if link.Header != nil {
		return link.Header.Size, nil
	}
	return link.File.Length(), nil
}
