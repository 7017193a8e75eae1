package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/backend/qcow2"
)

// Exit statuses of check, as of qemu-img check.
const (
	checkFailed  = 1 // it could not be done
	checkCorrupt = 2
	checkLeaks   = 3
	checkNone    = 63 // there is nothing to check in such an image
)

func newCheckCommand() *cobra.Command {
	var asJSON, share bool
	var ownerRecord string
	repair := &choice{words: []string{"leaks", "all"}}
	locking := choose("auto", "on", "off")
	cmd := &cobra.Command{
		Use:   "check [flags] IMAGE",
		Short: "Check the tables of a qcow2 image, and mend them",
		Long: `Check the tables of a qcow2 image: refcounts that are too high (leaks, which only
take space) or too low, and entries that cannot be right (corruptions). Nobody
may write the image meanwhile, so it is locked as by a reader, or with --repair
as by its owner, who also writes the owner record. An image that has an owner is
refused, and the error says who that is; with -U it is looked at all the same, and
what its owner is changing may be taken for damage.

--repair leaks gives back what is leaked. --repair all also raises refcounts that
are too low and makes flags fit them; what a broken entry once named cannot be
known. Kill it at any moment: the image is then no worse than before.

Exit status is that of qemu-img check: 0 nothing wrong (any more), 1 the check
could not be done, 2 corruptions, 3 only leaks, 63 a raw image, which has no
tables.`,
		Example: `  nbd-export check disk.qcow2
  nbd-export check --repair all disk.qcow2
  nbd-export check --json disk.qcow2 | jq .leaks`,
		Annotations: map[string]string{usageStatus: "1"},
		Args:        oneArg("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("owner-record") && ownerRecord == "" {
				return usageError{errors.New("check: --owner-record needs a path, or off")}
			}
			if share && repair.value != "" {
				return usageError{errors.New("check: -U only looks; whoever repairs an image has to be alone with it")}
			}
			lock := backend.LockingMode(locking.value)
			if share {
				lock = backend.LockingOff
				defer tellWriter(cmd, args[0], ownerRecord)
			}
			line := newStatusLine(os.Stderr)
			r := checkReport{Filename: args[0], Format: "qcow2"}
			err := r.run(cmd, repair.value, lock, ownerRecord, line.bar("checking "+args[0]))
			line.clear()
			if err != nil {
				return err
			}
			if asJSON {
				err = writeJSON(cmd.OutOrStdout(), r)
			} else {
				err = r.write(cmd.OutOrStdout())
			}
			if err != nil {
				return err
			}
			switch {
			case r.Corruptions > 0:
				return exitStatus(checkCorrupt)
			case r.Leaks > 0:
				return exitStatus(checkLeaks)
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.VarP(repair, "repair", "r", "mend leaks, or all: leaks, all")
	_ = cmd.RegisterFlagCompletionFunc("repair", cobra.FixedCompletions(repair.words, cobra.ShellCompDirectiveNoFileComp))
	forceShareFlag(cmd, &share, forceShareUsage)
	jsonFlag(cmd, &asJSON)
	locking.addTo(cmd, "locking", "", "lock the image: where locks do not work, off is your own care")
	ownerRecordFlag(cmd, &ownerRecord)
	// For those who are used to qemu-img: nothing else has tables to check.
	f.VarP(&choice{"qcow2", []string{"qcow2"}}, "format", "f", "`FMT` of the image")
	_ = f.MarkHidden("format")
	return cmd
}

// checkReport is what is printed; in JSON the members that qemu-img check has
// have its names.
type checkReport struct {
	Filename string `json:"filename"`
	Format   string `json:"format"`
	// What is left; Fixed is what is not.
	Corruptions      int64 `json:"corruptions"`
	Leaks            int64 `json:"leaks"`
	CorruptionsFixed int64 `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64 `json:"leaks-fixed,omitempty"`
	CheckErrors      int64 `json:"check-errors"` // always 0: those have no report

	Total      int64    `json:"total-clusters"`
	Allocated  int64    `json:"allocated-clusters"`
	Fragmented int64    `json:"fragmented-clusters"`
	Compressed int64    `json:"compressed-clusters"`
	EndOffset  int64    `json:"image-end-offset"` // bytes
	Findings   []string `json:"findings"`         // the first of what was found, in words
}

// run checks the image and fills r.
func (r *checkReport) run(cmd *cobra.Command, repair string, locking backend.LockingMode, ownerRecord string, progress func(done, total int64)) error {
	if repair == "" {
		link, err := backend.OpenLink(r.Filename, "auto", backend.ChainOptions{Lock: locking != backend.LockingOff})
		if err != nil {
			return refusedToLook(err)
		}
		defer link.Close()
		if link.Header == nil {
			return r.nothingToCheck(cmd)
		}
		found, err := qcow2.Check(link.File, link.Header, progress)
		if err != nil {
			return err
		}
		r.fill(found, found)
		return nil
	}
	what := qcow2.RepairLeaks
	if repair == "all" {
		what = qcow2.RepairAll
	}
	o := backend.Options{Path: r.Filename, Locking: locking, OwnerRecord: ownerRecord, Warn: func(s string) {
		_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "nbd-export: %s\n", s)
	}}
	return backend.AsOwner(o, func(f *backend.File) error {
		h, err := qcow2.ReadHeader(f)
		if err != nil {
			return err
		}
		before, after, err := qcow2.Mend(f, h, what, progress)
		if err != nil {
			return err
		}
		r.fill(before, after)
		return nil
	})
}

func (r *checkReport) nothingToCheck(cmd *cobra.Command) error {
	_, _ = fmt.Fprintf(cmd.ErrOrStderr(), "nbd-export: %s is a raw image, which has no tables to check\n", r.Filename)
	return exitStatus(checkNone)
}

func (r *checkReport) fill(before, after *qcow2.Report) {
	r.Corruptions, r.Leaks = after.Corruptions, after.Leaks
	r.CorruptionsFixed, r.LeaksFixed = after.CorruptionsFixed, after.LeaksFixed
	r.Total, r.Allocated, r.Fragmented, r.Compressed = after.Total, after.Allocated, after.Fragmented, after.Compressed
	r.EndOffset = after.EndOffset
	r.Findings = append([]string{}, before.Findings...)
}

// write prints r for people.
func (r *checkReport) write(out io.Writer) error {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintln(&b, f)
	}
	if n := r.CorruptionsFixed + r.LeaksFixed; n > 0 {
		fmt.Fprintf(&b, "Mended: %d corruptions, %d leaked clusters.\n", r.CorruptionsFixed, r.LeaksFixed)
	}
	switch {
	case r.Corruptions+r.Leaks == 0:
		fmt.Fprintln(&b, "No errors were found on the image.")
	case r.Corruptions > 0:
		fmt.Fprintf(&b, "%d errors were found on the image. Data may be lost, and writing may lose more.\n", r.Corruptions)
		fallthrough
	default:
		if r.Leaks > 0 {
			fmt.Fprintf(&b, "%d leaked clusters were found on the image. They take space and do no other harm.\n", r.Leaks)
		}
	}
	if r.Total > 0 {
		percent := func(n, of int64) float64 { return 100 * float64(n) / float64(max(of, 1)) }
		fmt.Fprintf(&b, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			r.Allocated, r.Total, percent(r.Allocated, r.Total), percent(r.Fragmented, r.Allocated), percent(r.Compressed, r.Allocated))
	}
	fmt.Fprintf(&b, "Image end offset: %d\n", r.EndOffset)
	_, err := io.WriteString(out, b.String())
	return err
}

// bar shows how far something is, as long as the status line is there.
func (s *statusLine) bar(what string) func(done, total int64) {
	const width = 40
	shown := int64(-1)
	return func(done, total int64) {
		percent := int64(100)
		if total > 0 {
			percent = int64(100 * (float64(done) / float64(total)))
		}
		if percent == shown {
			return
		}
		shown = percent
		n := int(percent * width / 100)
		s.show(fmt.Sprintf("%s [%s%s] %d%%", what, strings.Repeat("=", n), strings.Repeat(" ", width-n), percent))
	}
}
