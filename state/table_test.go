package state

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
)

var update = flag.Bool("update", false, "write the diagram into docs/architecture.md")

// pairs is every (state, event) pair, written from the design and not from
// the code:
//
//	> state  the state becomes that one
//	=        nothing changes, and that is a success
//	+        joins the transition under way
//	no       the order is refused
//	!        cannot happen; a defect of this package
const pairs = `
event             | inactive     | activating | active           | inactivating     | failed(io)       | failed(fenced) | closed
activate          | > activating | +          | =                | no               | no               | no             | no
inactivate        | =            | no         | > inactivating   | +                | no               | no             | no
abandon           | =            | no         | no               | no               | > inactive       | > inactive     | no
published         | !            | > active   | !                | !                | !                | !              | !
activate failed   | !            | > inactive | !                | !                | !                | !              | !
released          | !            | !          | !                | > inactive       | !                | !              | !
inactivate failed | !            | !          | !                | > active         | !                | !              | !
sync failed       | =            | =          | > failed(io)     | > failed(io)     | =                | =              | =
fenced            | =            | =          | > failed(fenced) | > failed(fenced) | > failed(fenced) | =              | =
stop              | > closed     | no         | > closed         | no               | > closed         | > closed       | =
`

type pair struct{ state, event, outcome string }

func goldenPairs(t *testing.T) []pair {
	var out []pair
	var states []string
	for i, line := range strings.Split(strings.TrimSpace(pairs), "\n") {
		cols := strings.Split(line, "|")
		for j := range cols {
			cols[j] = strings.TrimSpace(cols[j])
		}
		if i == 0 {
			states = cols[1:]
			continue
		}
		for j, o := range cols[1:] {
			out = append(out, pair{states[j], cols[0], o})
		}
	}
	if len(out) != int(numStates)*int(numEvents) {
		t.Fatalf("%d pairs, want %d states times %d events", len(out), numStates, numEvents)
	}
	return out
}

func stateNamed(t *testing.T, name string) State {
	for s := range numStates {
		if s.String() == name {
			return s
		}
	}
	t.Fatalf("no state %q", name)
	return 0
}

func eventNamed(t *testing.T, name string) Event {
	for e := range numEvents {
		if e.String() == name {
			return e
		}
	}
	t.Fatalf("no event %q", name)
	return 0
}

func TestTable(t *testing.T) {
	for _, p := range goldenPairs(t) {
		s, e := stateNamed(t, p.state), eventNamed(t, p.event)
		c := table[s][e]
		got := map[outcome]string{impossible: "!", stays: "=", joins: "+", refused: "no"}[c.kind]
		if c.kind == moves {
			got = "> " + c.next.String()
		} else if c.kind != impossible && c.next != s {
			t.Errorf("%s, %s: does not move, but names %s", s, e, c.next)
		}
		check(t, p.state+", "+p.event, got, p.outcome)
		want := fmt.Sprint(c.next, p.outcome != "!" && p.outcome != "no")
		next, ok := After(s, e)
		check(t, "after "+p.state+", "+p.event, fmt.Sprint(next, ok), want)

		if c.kind != moves { // the one mutator must not be talked into it
			func() {
				defer func() {
					if recover() == nil {
						t.Errorf("%s, %s: applied although the table does not move", s, e)
					}
				}()
				m := NewMachine(newFake("a", 1, nil), Options{})
				m.mu.state = s
				m.applyLocked(e, nil)
			}()
		}
	}
}

// into brings a rig of one machine into state s by orders alone. done waits
// for the transition that is stopped in the middle, if there is one.
func into(t *testing.T, r *rig, s State) (done func()) {
	t.Helper()
	ctx, m, done := t.Context(), r.ms[0], func() {}
	hold := func(at Step, order func()) {
		there, goOn := r.pauseAt(at)
		over := make(chan struct{})
		go func() { order(); close(over) }()
		<-there
		done = func() { goOn(); <-over }
	}
	switch s {
	case Inactive:
	case Activating:
		hold(StepLoad, func() { noError(t, Activate(ctx, ActivateOptions{}, m)) })
	case Active:
		noError(t, Activate(ctx, ActivateOptions{}, m))
	case Inactivating:
		into(t, r, Active)
		hold(StepDrain, func() { _ = Inactivate(ctx, m) }) // its end is what is tested
	case FailedIO:
		into(t, r, Active)
		r.lanes[0].Fault(errSync)
	case FailedFenced:
		into(t, r, Active)
		m.Fence(errFence)
	case Closed:
		noError(t, Stop(m))
	}
	check(t, "brought into", m.Status().State.String(), s.String())
	return done
}

// TestEveryEventOnAMachine gives every order and every fault to a machine in
// each state and compares what becomes of it with the same golden.
func TestEveryEventOnAMachine(t *testing.T) {
	for _, p := range goldenPairs(t) {
		e := eventNamed(t, p.event)
		var give func(r *rig) error
		ctx := context.Background()
		switch e {
		case OrderActivate:
			give = func(r *rig) error { return Activate(ctx, ActivateOptions{}, r.ms...) }
		case OrderInactivate:
			give = func(r *rig) error { return Inactivate(ctx, r.ms...) }
		case OrderAbandon:
			give = func(r *rig) error { return Abandon(ctx, r.ms...) }
		case SyncFailed:
			give = func(r *rig) error { r.lanes[0].Fault(errSync); return nil }
		case Fenced:
			give = func(r *rig) error { r.ms[0].Fence(errFence); return nil }
		case OrderStop:
			give = func(r *rig) error { return Stop(r.ms...) }
		default:
			continue // steps of a transition: TestSteps
		}
		t.Run(p.state+"/"+p.event, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Options{}, "a")
				s := stateNamed(t, p.state)
				done := into(t, r, s)
				r.forget()
				before := r.ms[0].Status()

				result := make(chan error, 1)
				go func() { result <- give(r) }()
				synctest.Wait()
				waits := len(result) == 0
				during := r.ms[0].Status().State
				done()
				err := <-result
				var oe *OrderError
				if errors.As(err, &oe) && (oe.State != s || oe.Order != e || oe.Image != "a") {
					t.Errorf("error is about %v %v %v", oe.Image, oe.Order, oe.State)
				}

				switch {
				case p.outcome == "no" && e == OrderStop:
					// Stop outlives a transition instead of being refused.
					if !waits || during != s || err != nil || r.states() != "closed" {
						t.Errorf("stop during a transition: waits %v, state %v then %s, error %v", waits, during, r.states(), err)
					}
				case p.outcome == "no":
					if oe == nil || waits || during != s {
						t.Errorf("refused: waits %v, state %v, error %v", waits, during, err)
					}
				case p.outcome == "=":
					if err != nil || waits || during != s {
						t.Errorf("nothing to do: waits %v, state %v, error %v", waits, during, err)
					}
					if after := r.ms[0].Status(); s != Activating && (before.Since != after.Since || before.Epoch != after.Epoch) {
						t.Errorf("nothing to do: %+v became %+v", before, after)
					}
					if s != Activating && r.trace.take() != "" {
						t.Error("nothing to do, and yet the image was touched")
					}
				case p.outcome == "+":
					if err != nil || !waits || during != s {
						t.Errorf("joins: waits %v, state %v, error %v", waits, during, err)
					}
				default:
					// Transitional states have passed by now.
					got := "> " + map[string]string{
						"activating": "active", "inactivating": "inactive",
					}[strings.TrimPrefix(p.outcome, "> ")]
					if got == "> " {
						got = p.outcome
					}
					check(t, "moves", "> "+r.states(), got)
				}
			})
		})
	}
}

// TestVerdicts is the design's table: what READ, WRITE-class, query and FLUSH
// requests get in each state.
func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		state    State
		readOnly bool
		gate     string // Mutate, Query, Flush: Admitted, Wait, Nothing, Refused
		refusal  string
		stopping bool
	}{
		{state: Inactive, gate: "RRN", refusal: "export is inactive"},
		{state: Inactive, readOnly: true, gate: "RRN", refusal: "export is inactive"},
		{state: Activating, gate: "WWW"},
		{state: Activating, readOnly: true, gate: "WWW"},
		{state: Active, gate: "AAA"},
		{state: Active, readOnly: true, gate: "RAN", refusal: "export is read-only"},
		{state: Inactivating, gate: "WWW"},
		{state: Inactivating, readOnly: true, gate: "WWW"},
		{state: FailedIO, gate: "RAR", refusal: "image a is failed(io): fdatasync: input/output error; " +
			"writes are refused until it is given up with inactivate --abandon, or the process ends"},
		{state: FailedIO, readOnly: true, gate: "RAR", refusal: "image a is failed(io): fdatasync: input/output error; " +
			"writes are refused until it is given up with inactivate --abandon, or the process ends"},
		{state: FailedFenced, gate: "RAR", refusal: "image a is failed(fenced): owner record has epoch 9; " +
			"writes are refused until it is given up with inactivate --abandon, or the process ends"},
		{state: Closed, gate: "RRR", refusal: "server is shutting down", stopping: true},
	} {
		t.Run(fmt.Sprint(c.state, c.readOnly), func(t *testing.T) {
			r := newRig(t, Options{ReadOnly: c.readOnly}, "a")
			defer into(t, r, c.state)()
			l := r.lanes[0]
			check(t, "gate", r.gates(), c.gate)
			if strings.Contains(c.gate, "R") {
				check(t, "refusal", l.Refusal().Error(), c.refusal)
			}
			g := l.EnterRead()
			if l.Stopping() != c.stopping {
				t.Errorf("reads refused: %v, want %v", l.Stopping(), c.stopping)
			} else if !c.stopping {
				r.imgs[0].read()
			}
			l.LeaveRead(g)
		})
	}
}

// TestGateByStep is what the gate says at each step of the transitions.
func TestGateByStep(t *testing.T) {
	for _, c := range []struct {
		readOnly bool
		want     string
	}{
		{false, "lock WWW, load WWW, claim WWW, publish WWW, retire AAA, " +
			"sync-ahead AAA, close-gate WWW, drain WWW, settle WWW, release WWW, " +
			"lock WWW, load WWW, claim WWW, publish WWW, retire AAA, abandon RWR, stop RRR, "},
		{true, "lock WWW, load WWW, claim WWW, publish WWW, retire RAN, " +
			"sync-ahead RAN, close-gate WWW, drain WWW, settle WWW, release WWW, " +
			"lock WWW, load WWW, claim WWW, publish WWW, retire RAN, abandon RWR, stop RRR, "},
	} {
		r := newRig(t, Options{ReadOnly: c.readOnly}, "a")
		var got string
		for _, s := range []Step{StepLock, StepLoad, StepClaim, StepPublish, StepRetire, StepSyncAhead, StepCloseGate,
			StepDrain, StepSettle, StepRelease, StepAbandon, StepStop} {
			r.on(s, func(string) {
				if st := r.ms[0].Status(); st.Step != s || st.StepSince.IsZero() {
					t.Errorf("at step %s, status says %s since %v", s, st.Step, st.StepSince)
				}
				got += string(s) + " " + r.gates() + ", "
			})
		}
		ctx := t.Context()
		noError(t, Activate(ctx, ActivateOptions{}, r.ms...))
		noError(t, Inactivate(ctx, r.ms...))
		noError(t, Activate(ctx, ActivateOptions{}, r.ms...))
		r.lanes[0].Fault(errSync)
		noError(t, Abandon(ctx, r.ms...))
		if st := r.ms[0].Status(); st.Step != "" || !st.StepSince.IsZero() || st.Epoch != 2 || st.LastError != nil || st.Cause != nil {
			t.Errorf("afterwards %+v", st)
		}
		noError(t, Stop(r.ms...))
		check(t, "gates", got, c.want)
	}
}

const diagram = `stateDiagram-v2
    [*] --> inactive
    inactive --> activating: activate
    inactive --> closed: stop
    activating --> active: published
    activating --> inactive: activate failed
    active --> inactivating: inactivate
    active --> failed_io: sync failed
    active --> failed_fenced: fenced
    active --> closed: stop
    inactivating --> inactive: released
    inactivating --> active: inactivate failed
    inactivating --> failed_io: sync failed
    inactivating --> failed_fenced: fenced
    failed_io --> inactive: abandon
    failed_io --> failed_fenced: fenced
    failed_io --> closed: stop
    failed_fenced --> inactive: abandon
    failed_fenced --> closed: stop
    closed --> [*]
`

// drawn is the table as a Mermaid state diagram.
func drawn() string {
	id := strings.NewReplacer("(", "_", ")", "")
	var b strings.Builder
	b.WriteString("stateDiagram-v2\n    [*] --> inactive\n")
	for s := range table {
		for e, c := range table[s] {
			if c.kind == moves {
				fmt.Fprintf(&b, "    %s --> %s: %s\n", id.Replace(State(s).String()), id.Replace(c.next.String()), Event(e))
			}
		}
	}
	b.WriteString("    closed --> [*]\n")
	return b.String()
}

func TestDiagram(t *testing.T) { check(t, "diagram", drawn(), diagram) }

var diagramBlock = regexp.MustCompile("(?s)(^|\n)```mermaid\n(stateDiagram-v2\n.*?)?```\n")

// embed puts the diagram into the first Mermaid block of text that is a state
// diagram or empty. It reports whether there is one.
func embed(text string) (string, bool) {
	at := diagramBlock.FindStringSubmatchIndex(text)
	if at == nil {
		return text, false
	}
	return text[:at[3]] + "```mermaid\n" + drawn() + "```\n" + text[at[1]:], true
}

// TestDiagramInDocs keeps the diagram of docs/architecture.md the one that the
// table gives.
func TestDiagramInDocs(t *testing.T) {
	file := filepath.Join("..", "docs", "architecture.md")
	text, err := os.ReadFile(file)
	noError(t, err)
	want, ok := embed(string(text))
	switch {
	case !ok:
		t.Fatal("docs/architecture.md has no Mermaid block for the diagram; add an empty one, then run: go test ./state -run TestDiagramInDocs -update")
	case want == string(text):
	case *update:
		noError(t, os.WriteFile(file, []byte(want), 0o644))
	default:
		t.Fatal("the diagram in docs/architecture.md is not that of the transition table; run: go test ./state -run TestDiagramInDocs -update")
	}
}

func TestEmbed(t *testing.T) {
	const other = "# X\n\n```mermaid\ngraph LR\n    a --> b\n```\n"
	block := "```mermaid\n" + diagram + "```\n"
	for text, want := range map[string]string{
		other + "y\n```mermaid\n```\nz\n":                        other + "y\n" + block + "z\n",
		other + "```mermaid\nstateDiagram-v2\n    old\n```\nz\n": other + block + "z\n",
		block:            block,
		other + "text\n": "",
	} {
		got, ok := embed(text)
		if !ok {
			got = ""
		}
		check(t, "embed", got, want)
	}
}

func TestNames(t *testing.T) {
	check(t, "state", State(99).String(), "state(99)")
	check(t, "event", Event(99).String(), "event(99)")
	var owns []string
	for s := range numStates {
		if s.Owns() {
			owns = append(owns, s.String())
		}
	}
	check(t, "owners", strings.Join(owns, " "), "active inactivating failed(io)")
}
