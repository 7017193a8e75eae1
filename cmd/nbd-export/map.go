package main

import (
	"bufio"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
)

func newMapCommand() *cobra.Command {
	var asJSON, share bool
	var allow []string
	format := choose("auto", "raw", "qcow2")
	locking := choose("auto", "on", "off")
	cmd := &cobra.Command{
		Use:   "map [flags] IMAGE",
		Short: "Show where the bytes of a disk are",
		Long: `Show where the bytes of a disk are: in which file of the backing chain, at which
offset of it, and what reads as zeros. The output is that of qemu-img map, with
--json to the byte; without it, what is compressed has no offset and says so.

All files are locked as by a reader, so nobody may be writing them, unless -U says
that this does not matter.`,
		Example: `  nbd-export map disk.qcow2
  nbd-export map --json overlay.qcow2 | jq '.[] | select(.data)'`,
		Args: oneArg("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if share {
				defer tellWriter(cmd, args[0], "")
			}
			c, err := backend.OpenChain(args[0], format.value, backend.ChainOptions{AllowBacking: allow, Lock: locking.value != "off" && !share})
			if err != nil {
				return refusedToLook(err)
			}
			defer c.Close()
			out := bufio.NewWriter(cmd.OutOrStdout())
			if asJSON {
				err = mapJSON(out, c)
			} else {
				err = mapText(out, c)
			}
			if err != nil {
				return err
			}
			return out.Flush()
		},
	}
	format.addTo(cmd, "format", "f", "of the image")
	forceShareFlag(cmd, &share, forceShareUsage)
	jsonFlag(cmd, &asJSON)
	locking.addTo(cmd, "locking", "", "lock the files: where locks do not work, off is your own care")
	allowBackingFlag(cmd, &allow)
	return cmd
}

// mapJSON prints one mapping a line, as qemu-img does.
func mapJSON(out *bufio.Writer, c *backend.Chain) error {
	between := "["
	err := c.Mappings(func(m backend.Mapping) error {
		offset := ""
		if m.Offset >= 0 {
			offset = fmt.Sprintf(`, "offset": %d`, m.Offset)
		}
		_, err := fmt.Fprintf(out, `%s{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t, "compressed": %t%s}`,
			between, m.Start, m.Length, m.Depth, m.Present, m.Zero, m.Data, m.Compressed, offset)
		between = ",\n"
		return err
	})
	if err != nil {
		return err
	}
	_, err = out.WriteString("]\n")
	return err
}

// mapText prints what has bytes of its own.
func mapText(out *bufio.Writer, c *backend.Chain) error {
	const row = "%-16s%-16s%-16s%s\n"
	_, err := fmt.Fprintf(out, row, "Offset", "Length", "Mapped to", "File")
	if err != nil {
		return err
	}
	return c.Mappings(func(m backend.Mapping) error {
		if !m.Data || m.Zero {
			return nil
		}
		to, path := "compressed", c.Links[m.Depth].Path
		if m.Offset >= 0 {
			to, path = fmt.Sprintf("%#x", m.Offset), m.Path
			if m.Offset == 0 {
				to = "0"
			}
		}
		start := "0"
		if m.Start > 0 {
			start = fmt.Sprintf("%#x", m.Start)
		}
		_, err := fmt.Fprintf(out, row, start, fmt.Sprintf("%#x", m.Length), to, backend.Printable(path))
		return err
	})
}
