package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nbd-export/nbd-export/backend"
	"github.com/nbd-export/nbd-export/control"
)

func newWhoCommand() *cobra.Command {
	var asJSON bool
	var ownerRecord string
	cmd := &cobra.Command{
		Use:   "who [flags] IMAGE",
		Short: "Show who owns an image, by its owner record and its locks",
		Long: `Show who owns an image: what its owner record says, and whether the locks on it
agree. It asks nobody, takes no lock and changes nothing. What keeps others out
are the locks; the record names who has them. QEMU writes no record, so an image
that QEMU has is locked and has none, or an old one; nor does an exporter where it
cannot, as in a directory of somebody else's. Whose locks they are is shown of processes of this host:
those of the same user, or all for root. IMAGE.owner.was, which may lie beside the
record, is what that said before; it says nothing any more.

Exit status is 0 whoever owns the image, and 1 if that cannot be told.`,
		Example: `  nbd-export who disk.img
  nbd-export who --json disk.img | jq -r .state`,
		Args: oneArg("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("owner-record") && ownerRecord == "" {
				return usageError{errors.New("who: --owner-record needs a path, or off")}
			}
			seen, err := backend.Who(args[0], ownerRecord)
			if err != nil {
				if asJSON {
					err = errors.Join(err, writeJSON(cmd.OutOrStdout(), who{Image: args[0], State: whoUnknown, Verdict: cannotTell, Locks: control.Locks{Held: "unknown"}, Error: err.Error()}))
				}
				return err
			}
			w := judge(args[0], seen, time.Now())
			if asJSON {
				err = writeJSON(cmd.OutOrStdout(), w)
			} else {
				err = w.write(cmd.OutOrStdout())
			}
			return errors.Join(err, seen.RecordErr, seen.LocksErr)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	ownerRecordFlag(cmd, &ownerRecord)
	return cmd
}

func ownerRecordFlag(cmd *cobra.Command, v *string) {
	cmd.Flags().StringVar(v, "owner-record", "", "owner record at `PATH`, or off (default IMAGE.owner, beside an image that is a file)")
	_ = cmd.MarkFlagFilename("owner-record")
}

// States of an image, as who tells them.
const (
	whoOwned   = "owned"   // the record and the locks agree
	whoForeign = "foreign" // locked by a program that the record does not name
	whoReaders = "readers" // locked by readers only
	whoFree    = "free"    // not locked, let go in order or never owned
	whoLeft    = "left"    // not locked, and the record's owner did not let go
	whoUnknown = "unknown"
)

const cannotTell = "that cannot be told: see the error"

// who is what is printed.
type who struct {
	Image   string               `json:"image"`
	State   string               `json:"state"`
	Verdict string               `json:"verdict"` // for people
	Place   control.Record       `json:"owner-record"`
	Record  *backend.OwnerRecord `json:"record"` // null if there is none
	// Process is what is known of the process that the record names: alive,
	// ended, unknown.
	Process backend.Process `json:"process,omitempty"`
	Locks   control.Locks   `json:"locks"` // held by anybody
	Holders []holder        `json:"holders,omitempty"`
	Error   string          `json:"error,omitempty"`
}

// holder is a process that is seen to have some of the locks.
type holder struct {
	PID     int    `json:"pid"`
	Program string `json:"program"`
	Locks   string `json:"locks"`
}

// judge holds the record against the locks.
func judge(image string, seen *backend.Ownership, now time.Time) who {
	w := who{
		Image: image, Record: seen.Owner, Locks: control.Locks{Held: "none", Scope: seen.Scope},
		Place: control.Record{Path: seen.Record.Path, PerProcess: seen.Record.PerProcess},
	}
	if len(seen.Locks) > 0 {
		w.Locks.Held = lockList(seen.Locks)
	}
	for _, h := range seen.Holders {
		w.Holders = append(w.Holders, holder{h.PID, h.Program, lockList(h.Locks)})
	}
	foreign := "another program, one that writes no record (QEMU, or an exporter that could not or was not to)"
	if writers := seen.Writers(); len(writers) > 0 {
		foreign = fmt.Sprintf("%v, which has not written the record", writers[0])
	}
	r, owner := seen.Owner, ""
	if r != nil {
		w.Process, owner = r.Process(), r.Owner(now)
	}
	if err := errors.Join(seen.RecordErr, seen.LocksErr); err != nil {
		w.State, w.Verdict = whoUnknown, cannotTell
		if seen.LocksErr != nil {
			w.Locks.Held = "unknown"
		}
		w.Error = strings.ReplaceAll(err.Error(), "\n", "; ")
		return w
	}
	claimed := r != nil && !r.Clean
	switch {
	case seen.Stale:
		w.State, w.Verdict = whoForeign, "locked by "+foreign+"; that is stale: it says owned by "+owner+", but that process does not have the locks"
	case seen.Written() && claimed && w.Process != backend.ProcessEnded:
		w.State, w.Verdict = whoOwned, "owned by "+owner+"; it is locked as that says"
	case seen.Written() && claimed:
		w.State, w.Verdict = whoForeign, "locked by "+foreign+": that says owned by "+owner+", but that process has ended"
	case seen.Written() && r != nil:
		w.State, w.Verdict = whoForeign, "locked by "+foreign+": that says let go in order by "+owner
	case seen.Written():
		w.State, w.Verdict = whoForeign, "locked by "+foreign
	case claimed:
		w.State = whoLeft
		w.Verdict = "record says owned by " + owner + ", but no lock of an owner is held: "
		switch w.Process {
		case backend.ProcessEnded:
			w.Verdict += "that process ended without letting go"
		case backend.ProcessLives:
			w.Verdict += "that process lives; it gave the image up without making it durable, takes no locks, or has a file that was here before this one"
		default:
			w.Verdict += "that process ended without letting go, or its locks do not reach this host"
		}
	case r != nil:
		w.State, w.Verdict = whoFree, "nobody owns it; the last owner let go in order: "+owner
	default:
		w.State, w.Verdict = whoFree, "nobody owns it"
	}
	if len(seen.Locks) > 0 && !seen.Written() {
		if w.State == whoFree {
			w.State = whoReaders
		}
		w.Verdict += "; readers hold locks that keep owners out"
	}
	return w
}

func lockList(bytes []int64) string {
	var s []string
	for _, b := range bytes {
		s = append(s, strconv.FormatInt(b, 10))
	}
	return strings.Join(s, ",")
}

// write prints w for people.
func (w who) write(out io.Writer) error {
	var b strings.Builder
	row := func(name, format string, a ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, backend.Printable(fmt.Sprintf(format, a...)))
	}
	row("image", "%s", w.Image)
	row("owner", "%s", w.Verdict)
	row("locks", "%s (%s)", w.Locks.Held, w.Locks.Scope)
	for _, h := range w.Holders {
		row("locked by", "%s, pid %d: %s", h.Program, h.PID, h.Locks)
	}
	row("owner record", "%s", recordText(w.Place))
	if r := w.Record; r != nil {
		row("epoch", "%d", r.Epoch)
		row("clean", "%t", r.Clean)
		row("process", "%s", w.Process)
	}
	_, err := io.WriteString(out, b.String())
	return err
}
