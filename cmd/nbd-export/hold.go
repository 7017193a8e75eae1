package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nbd-export/nbd-export/control"
)

// defaultHold is how long "hold" alone holds writes; the kernel's NBD client
// waits for 30 s at least.
const defaultHold = 5 * time.Second

// inactiveWrites is the flag that says what becomes of writes while an image is
// inactive: reject, hold or hold=DURATION.
type inactiveWrites struct{ hold time.Duration }

func (w *inactiveWrites) Type() string { return "MODE" }

func (w *inactiveWrites) String() string {
	if w.hold == 0 {
		return "reject"
	}
	return "hold=" + w.hold.String()
}

// Set implements pflag.Value.
func (w *inactiveWrites) Set(s string) error {
	mode, limit, given := strings.Cut(s, "=")
	switch {
	case s == "reject":
		w.hold = 0
	case s == "hold":
		w.hold = defaultHold
	case mode == "hold" && given:
		d, err := time.ParseDuration(limit)
		if err != nil || d <= 0 {
			return fmt.Errorf("%q is no time to hold writes for; give one as in hold=5s", limit)
		}
		w.hold = d
	default:
		return errors.New("must be one of reject, hold, hold=TIME")
	}
	return nil
}

// demandOptions are what an exporter does for writes to an inactive image.
type demandOptions struct {
	inactive inactiveWrites
	peers    []string // control sockets of those that may own the image
	back     bool     // a connection may take the image back
	minHold  time.Duration
}

func (o *demandOptions) addTo(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Var(&o.inactive, "inactive-writes", "while inactive, reject writes or keep them until activation: reject, hold, hold=`TIME`")
	f.StringArrayVar(&o.peers, "takeover", nil, "on a write while inactive, have the exporter with control socket `CTL` hand the image over, and activate; implies hold; may be repeated")
	f.BoolVar(&o.back, "takeover-back", false, "let connections that wrote before the image was handed over take it back")
	f.DurationVar(&o.minHold, "takeover-min-hold", time.Second, "keep the image active for `TIME` at least before a takeover may have it")
	_ = cmd.MarkFlagFilename("takeover")
	_ = cmd.RegisterFlagCompletionFunc("inactive-writes", cobra.FixedCompletions([]string{"reject", "hold"}, cobra.ShellCompDirectiveNoFileComp))
}

// settle checks the options, of which flags tells which were given, and fills in
// what they imply. own is the control socket of this exporter.
func (o *demandOptions) settle(flags *pflag.FlagSet, own string, readOnly bool) error {
	given := flags.Changed
	switch {
	case given("takeover") && given("inactive-writes") && o.inactive.hold == 0:
		return errors.New("--takeover needs writes to be held; leave out --inactive-writes reject")
	case given("takeover-back") && !given("takeover"):
		return errors.New("--takeover-back is of use only with --takeover")
	case readOnly && (given("takeover") || o.inactive.hold > 0):
		return errors.New("a --read-only export takes no writes, so it holds none and takes no image over for them")
	case slices.Contains(o.peers, ""):
		return errors.New("--takeover needs the control socket of a peer")
	case own != "" && slices.ContainsFunc(o.peers, func(p string) bool { return strings.TrimPrefix(p, "unix:") == own }):
		return fmt.Errorf("--takeover and --control are both %s; the peer is another exporter", own)
	case o.minHold < 0:
		return fmt.Errorf("--takeover-min-hold %v is negative", o.minHold)
	}
	if len(o.peers) > 0 && o.inactive.hold == 0 {
		o.inactive.hold = defaultHold
	}
	return nil
}

// takeover makes what takes and gives the image of d.
func (o *demandOptions) takeover(d *daemon) *control.Takeover {
	return control.NewTakeover(control.TakeoverConfig{Peers: o.peers, MinHold: o.minHold, Log: d.log})
}
