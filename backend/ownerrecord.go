package backend

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// An owner record, in four files: what it says (here), where it is
// (recordplace.go), how its file is read and replaced (recordfile.go), and what
// an owner does with it (recordclaim.go).

const (
	recordMax = 64 << 10 // bytes read of a record
	epochMax  = 1 << 53  // what every reader of JSON can hold
)

// OwnerRecord is what IMAGE.owner says: who owns the image, or owned it last.
// It names the holder of the locks to others and counts owners; what keeps two
// owners apart are the locks. Members that are not known are ignored.
type OwnerRecord struct {
	Host   string `json:"host"`
	PID    int    `json:"pid"`
	BootID string `json:"boot-id"` // of the kernel that PID belongs to
	// Numbering is the namespace that PID counts in, "" if that is not known: a
	// container numbers its processes anew.
	Numbering string `json:"pid-namespace,omitempty"`

	Control string    `json:"control,omitempty"` // absolute path of the control socket
	Since   time.Time `json:"since"`             // when it became the owner
	Epoch   uint64    `json:"epoch"`             // each owner's is higher than the last one's
	// Clean: the owner let go, and everything it wrote is durable.
	Clean bool   `json:"clean"`
	Nonce string `json:"nonce,omitempty"` // proves to a peer that both see one storage
	// Image is the size and the times of the image that was let go clean, ""
	// where others may not see the same. As long as they are those, and the
	// kernel is the one of BootID, nothing has to be synced.
	Image string `json:"image,omitempty"`
}

// Owner is the owner in words: "nbd-export on a, pid 812, since 10:02, epoch
// 7 (control /run/a.ctl)".
func (r *OwnerRecord) Owner(now time.Time) string {
	since, layout := r.Since.In(now.Location()), "2006-01-02 15:04"
	if since.Year() == now.Year() && since.YearDay() == now.YearDay() {
		layout = "15:04"
	}
	s := fmt.Sprintf("nbd-export on %s, pid %d, since %s, epoch %d", Printable(r.Host), r.PID, since.Format(layout), r.Epoch)
	if r.Control != "" {
		s += fmt.Sprintf(" (control %s)", Printable(r.Control))
	}
	return s
}

// release is what has the owner let go, to be typed on its host.
func (r *OwnerRecord) release() string {
	switch {
	case r.Control == "":
		return fmt.Sprintf("SIGUSR2 to pid %d", r.PID)
	case strings.Trim(r.Control, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+@:") == "":
		return "nbd-export inactivate --control " + r.Control
	}
	return "nbd-export inactivate --control CTL" // a shell would make something else of it
}

// Printable is s without what would do more to a terminal than print.
func Printable(s string) string {
	return strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return '?'
		}
		return c
	}, s)
}

// Process tells what is known of the process that a record names.
type Process string

const (
	ProcessLives   Process = "alive"
	ProcessEnded   Process = "ended"
	ProcessUnknown Process = "unknown" // it is, or was, another host's or container's
)

// Process looks for the process that r names. A pid that lives may be another
// process by now.
func (r *OwnerRecord) Process() Process {
	me := thisProcess()
	switch {
	case r.Host != me.Host || r.BootID == "" || me.BootID == "":
		return ProcessUnknown
	case r.BootID != me.BootID:
		return ProcessEnded // that host has been started anew
	case r.Numbering != me.Numbering && r.Numbering != "" && me.Numbering != "":
		return ProcessUnknown
	case unix.Kill(r.PID, 0) == unix.ESRCH || isZombie(r.PID):
		return ProcessEnded
	}
	return ProcessLives
}

// isZombie reports whether a process has ended and only its number is left, until
// its parent asks what became of it. Containers often have a first process that
// never does. One thread that still waits for a disk keeps the files open, and
// makes a process that is killed none.
func isZombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	name := bytes.LastIndexByte(b, ')') // which may have spaces and parentheses
	f := strings.Fields(string(b[name+1:]))
	const state, threads = 0, 17
	return len(f) > threads && f[state] == "Z" && f[threads] == "1"
}

// thisProcess is who a record of ours names.
var thisProcess = sync.OnceValue(func() OwnerRecord {
	me := OwnerRecord{PID: os.Getpid()}
	if me.Host, _ = os.Hostname(); me.Host == "" {
		me.Host = "localhost"
	}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		me.BootID = strings.TrimSpace(string(b))
	}
	me.Numbering, _ = os.Readlink("/proc/self/ns/pid")
	return me
})

// sameOwner tells whether two records are of one ownership. The time tells
// processes apart that two containers number alike.
func (r *OwnerRecord) sameOwner(o *OwnerRecord) bool {
	return r.Host == o.Host && r.PID == o.PID && r.BootID == o.BootID && r.Since.Equal(o.Since)
}

// RecordError says that an owner record cannot be used: something else stands
// at its place, or it cannot be read.
type RecordError struct {
	Path string
	Err  error
}

func (e *RecordError) Error() string {
	return fmt.Sprintf("owner record %s: %v; it guards against two owners, so make sure that nobody owns the image, and remove it, or choose another with --owner-record PATH, or none with --owner-record off", e.Path, e.Err)
}

func (e *RecordError) Unwrap() error { return e.Err }

// notARecord is the cause of a RecordError for what never was one.
func notARecord(format string, args ...any) error {
	return &refusal{"this is no owner record: " + fmt.Sprintf(format, args...), unix.EINVAL}
}

// parseRecord judges the content of a record.
func parseRecord(b []byte) (*OwnerRecord, error) {
	if len(b) > recordMax {
		return nil, notARecord("it is longer than %d bytes", recordMax)
	}
	if r, ok := parseOwnForm(b); ok {
		return r, nil
	}
	var m struct {
		OwnerRecord
		PID   *int       `json:"pid"`
		Since *time.Time `json:"since"`
		Epoch *uint64    `json:"epoch"`
		Clean *bool      `json:"clean"`
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, notARecord("%v", err)
	}
	switch {
	case m.Host == "":
		return nil, notARecord("it names no host")
	case m.PID == nil || *m.PID <= 0:
		return nil, notARecord("it names no process")
	case m.Since == nil || m.Clean == nil:
		return nil, notARecord("it does not say since when, or whether it is clean")
	case m.Epoch == nil || *m.Epoch == 0 || *m.Epoch >= epochMax:
		return nil, notARecord("it has no epoch")
	}
	r := m.OwnerRecord
	r.PID, r.Since, r.Epoch, r.Clean = *m.PID, *m.Since, *m.Epoch, *m.Clean
	return &r, nil
}
