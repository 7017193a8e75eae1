package state

// Step names a step of a transition, in status, logs and tests.
type Step string

// The steps of inactivation, in their order.
const (
	StepSyncAhead Step = "sync-ahead"
	StepCloseGate Step = "close-gate"
	StepDrain     Step = "drain"
	StepSettle    Step = "settle"
	StepRelease   Step = "release"
)

// The steps of activation, in their order.
const (
	StepLock    Step = "lock"
	StepLoad    Step = "load"
	StepClaim   Step = "claim"
	StepPublish Step = "publish"
	StepRetire  Step = "retire"
)

// StepAbandon is the step of giving up a failed image.
const StepAbandon Step = "abandon"

// StepStop is the step of letting go at the end of the process.
const StepStop Step = "stop"

// gateClosed reports whether no request but reads is admitted at step s of
// letting an image go. Of a failed image that includes queries: a transition
// that drained counts on them too.
func (s Step) gateClosed() bool {
	switch s {
	case StepCloseGate, StepDrain, StepSettle, StepRelease, StepAbandon, StepStop:
		return true
	}
	return false
}
