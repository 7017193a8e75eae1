package control

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nbd-export/nbd-export/ioloop"
	"github.com/nbd-export/nbd-export/state"
)

// Status is the answer to x-query-status and what "status --json" prints, one
// per control socket. Times are RFC 3339, durations are seconds, sizes bytes.
type Status struct {
	Version  string        `json:"version"`
	PID      int           `json:"pid"`
	Since    time.Time     `json:"since"` // when the process started
	Stopping bool          `json:"stopping"`
	Images   []ImageStatus `json:"images"`
}

// ImageStatus is one image of a Status.
type ImageStatus struct {
	Node  string `json:"node-name"`
	Image string `json:"image"` // path, as given
	// PathLost is set if that does not name the active image any more: where its
	// bytes are, until the server ends.
	PathLost string `json:"path-lost,omitempty"`
	Format   string `json:"format"`
	Size     int64  `json:"size"`
	ReadOnly bool   `json:"read-only"`
	// Export is the first of Exports, empty if there is none.
	Export  Export   `json:"export"`
	Exports []Export `json:"exports"`

	State State     `json:"state"`
	Epoch uint64    `json:"epoch"` // of the last activation
	Since time.Time `json:"since"` // when the state was reached
	// Step and StepSeconds are set while a transition is under way.
	Step        string  `json:"step,omitempty"`
	StepSeconds float64 `json:"step-seconds,omitempty"`
	// Repair is set while a step repairs the image.
	Repair *Repair `json:"repair,omitempty"`
	// Cause is why the image failed, LastError why the last order did.
	Cause     string `json:"cause,omitempty"`
	LastError string `json:"last-error,omitempty"`

	// Slow is the oldest request that storage has not finished, if that takes
	// longer than slowRequest.
	Slow *SlowRequest `json:"slow-request,omitempty"`

	Locks  Locks  `json:"locks"`
	Record Record `json:"owner-record"`
	ioloop.Stats
}

// slowRequest is how long a request may take before status tells of it.
const slowRequest = time.Second

// SlowRequest is a request that storage takes long for.
type SlowRequest struct {
	Request string  `json:"request"` // in words
	Seconds float64 `json:"seconds"`
}

// Repair is how far a repair has come, in bytes of the image.
type Repair struct {
	Done  int64 `json:"done"`
	Total int64 `json:"total"`
}

// Locks says how the image is protected.
type Locks struct {
	// Held lists the locked bytes, as in "100,101,103,201,203", or is "none".
	Held string `json:"held"`
	// Scope is whom the locks keep away: "cluster" everybody who can open the
	// file, "host-local" programs on this host, "off" nobody.
	Scope string `json:"scope"`
}

// Record says where the owner record is, which makes epochs go up from owner
// to owner.
type Record struct {
	Path string `json:"path,omitempty"`
	// PerProcess is why there is none, so that epochs count only the
	// ownerships of the process.
	PerProcess string `json:"per-process,omitempty"`
}

// State is the name of a state.State; the names are those of its String.
type State string

var (
	stateActive       = State(state.Active.String())
	stateInactive     = State(state.Inactive.String())
	stateActivating   = State(state.Activating.String())
	stateInactivating = State(state.Inactivating.String())
)

// Active reports whether the server owns the image and serves writes, now or
// until it has handed over.
func (s State) Active() bool { return s == stateActive || s == stateInactivating }

// holds reports whether the server has the image, for writing or since it
// failed.
func (s State) holds() bool { return s == stateActive || s.failed() }

// moving reports whether a transition is under way.
func (s State) moving() bool { return s == stateActivating || s == stateInactivating }

func (s State) failed() bool { return strings.HasPrefix(string(s), "failed") }

// image is the image with that node, nil if there is none.
func (s *Status) image(node string) *ImageStatus {
	for i := range s.Images { // they are large, and there may be a thousand
		if s.Images[i].Node == node {
			return &s.Images[i]
		}
	}
	return nil
}

// states sums up the states of these nodes, or of all if none is named:
// "inactive", or "1 active, 2 inactive".
func (s *Status) states(nodes []string) string {
	count := map[State]int{}
	var order []State
	for _, i := range s.Images {
		if len(nodes) > 0 && !slices.Contains(nodes, i.Node) {
			continue
		}
		if count[i.State] == 0 {
			order = append(order, i.State)
		}
		count[i.State]++
	}
	switch len(order) {
	case 0:
		return "without images"
	case 1:
		return string(order[0])
	}
	var words []string
	for _, o := range order {
		words = append(words, fmt.Sprintf("%d %s", count[o], o))
	}
	return strings.Join(words, ", ")
}

// Status never waits.
func (t *Target) Status() ImageStatus {
	m, info := t.Machine.Status(), t.Image.Info()
	s := ImageStatus{
		Node: t.Node, Image: info.Path, Format: info.Format, Size: t.Image.Size(),
		ReadOnly: t.readOnly(), Export: t.firstExport(), Exports: t.Exports(),
		State: State(m.State.String()), Epoch: m.Epoch, Since: m.Since, Step: string(m.Step),
		Cause: errorText(m.Cause), LastError: errorText(m.LastError),
		Locks: Locks{Held: "unknown", Scope: "unknown"},
	}
	if m.Step != "" {
		s.StepSeconds = time.Since(m.StepSince).Seconds()
	}
	if what, age := t.Machine.Oldest(); age > slowRequest {
		s.Slow = &SlowRequest{what, age.Seconds()}
	}
	if t.Repairing != nil {
		if done, total := t.Repairing(); total > 0 {
			s.Repair = &Repair{done, total}
		}
	}
	if t.PathLost != nil {
		s.PathLost = t.PathLost()
	}
	if t.Locks != nil {
		s.Locks = t.Locks()
	}
	if t.Record != nil {
		s.Record = t.Record()
	}
	if t.Stats != nil {
		s.Stats = t.Stats()
	}
	return s
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
