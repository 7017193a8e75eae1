// Command nbd-export serves disk images over NBD, and every image has an
// owner: ownership is handed from one exporter to another while clients stay
// connected. Each verb has a file; this one has what they share.
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nbd-export/nbd-export/control"
)

// version is set when a release is built: -ldflags "-X main.version=1.2.3".
var version = "0.1.0-dev"

// usageError is a wrong use of the command line: exit status 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// exitStatus ends a verb that has said all there is to say.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// usageStatus annotates a verb whose statuses are those of another program, so
// that 2 is not wrong usage.
const usageStatus = "usage-status"

func main() {
	// Signals are orders to a server from its first moment. Other verbs keep
	// what a terminal's user expects.
	var signals *control.Signals
	if len(os.Args) > 1 && (os.Args[1] == "serve" || os.Args[1] == "daemon") {
		signals = control.CatchSignals()
	}
	os.Exit(run(newRootCommand(signals), os.Args[1:]))
}

// run executes the command line and returns the exit status: 0 fine, 1 failed,
// 2 wrong usage, unless the verb has its own.
func run(root *cobra.Command, args []string) int {
	ran := false
	root.PersistentPreRun = func(*cobra.Command, []string) { ran = true }
	root.SetArgs(args)
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	if _, unknown := errors.AsType[*pflag.NotExistError](err); unknown && cmd == root && !strings.HasPrefix(args[0], "-") {
		err = root.Args(root, args) // it is the flag of a verb that there is not
	}
	text := strings.ReplaceAll(strings.TrimSpace(inWords(err)), "\n", "; ")
	// What fails before a verb runs is its flags or arguments.
	_, usage := errors.AsType[usageError](err)
	if usage || !ran {
		_, _ = fmt.Fprintf(root.ErrOrStderr(), "nbd-export: %s; see %s --help\n", text, cmd.CommandPath())
		if status, err := strconv.Atoi(cmd.Annotations[usageStatus]); err == nil {
			return status
		}
		return 2
	}
	_, _ = fmt.Fprintf(root.ErrOrStderr(), "nbd-export: %s\n", text)
	return 1
}

// inWords is the text of err, without what Go's functions say of a flag that is
// no number, or no time.
func inWords(err error) string {
	text := err.Error()
	if num, ok := errors.AsType[*strconv.NumError](err); ok {
		word := "not a number"
		if num.Err == strconv.ErrRange {
			word = "too large or too small a number"
		}
		return strings.Replace(text, num.Error(), word, 1)
	}
	if before, _, ok := strings.Cut(text, " flag: time: "); ok {
		return before + " flag: not a time such as 500ms, 10s or 2m"
	}
	return text
}

// newRootCommand assembles the verbs. signals is nil unless the verb is serve or
// daemon.
func newRootCommand(signals *control.Signals) *cobra.Command {
	root := &cobra.Command{
		Use:   "nbd-export",
		Short: "Serve disk images over NBD, with an owner for every image",
		Long: `nbd-export serves disk images over NBD. Any number of exporters may serve one
image, of which at most one owns it: it holds the locks and takes writes, the
others serve reads and refuse writes. Ownership is handed over while clients
stay connected, by a signal or over the control socket.`,
		Example: `  nbd-export serve -k /run/nbd.sock --control /run/nbd.ctl disk.img
  nbd-export status --control /run/nbd.ctl`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("no verb given")
			}
			text := fmt.Sprintf("there is no verb %q", args[0])
			if like := cmd.SuggestionsFor(args[0]); len(like) > 0 {
				text += "; did you mean " + strings.Join(like, " or ") + "?"
			}
			return errors.New(text)
		},
		RunE: func(*cobra.Command, []string) error { return nil }, // Args refuses all
	}
	root.SuggestionsMinimumDistance = 2
	root.SetFlagErrorFunc(flagError)
	root.Version = version
	root.SetVersionTemplate(versionLine())
	root.Flags().BoolP("version", "V", false, "print the version")
	// The program alone does nothing: its usage is that with a verb.
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), "{{if .Runnable}}", "{{if and .Runnable .HasParent}}", 1))
	root.AddCommand(
		newServeCommand(signals),
		newDaemonCommand(signals),
		newActivateCommand(),
		newInactivateCommand(),
		newHandoverCommand(),
		newStatusCommand(),
		newControlStdioCommand(),
		newWhoCommand(),
		newInfoCommand(),
		newCheckCommand(),
		newCreateCommand(),
		newMapCommand(),
		newBenchCommand(),
		newDemoCommand(),
		newVersionCommand(),
		newManCommand(),
	)
	root.InitDefaultCompletionCmd("completion") // as if it were called: it is made only then
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		nameOnce(c)
		switch c.Name() {
		case "completion":
			c.Args, c.RunE = anyShell, func(*cobra.Command, []string) error { return nil }
		case "help":
			c.Args = aVerb
		}
	}
	return root
}

// aVerb refuses help on what is no verb.
func aVerb(cmd *cobra.Command, args []string) error {
	if _, rest, err := cmd.Root().Find(args); err != nil || len(rest) > 0 {
		return fmt.Errorf("there is no verb %q", strings.Join(args, " "))
	}
	return nil
}

// anyShell refuses what completion has not handed on to the verb of a shell.
func anyShell(_ *cobra.Command, args []string) error {
	const shells = "bash, fish, powershell or zsh"
	if len(args) == 0 {
		return errors.New("completion needs the name of a shell: " + shells)
	}
	return fmt.Errorf("completion is for %s, but got %q", shells, args[0])
}

// oneArg accepts exactly one argument, called what.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0 || args[0] == "":
			return fmt.Errorf("%s needs one argument, %s", cmd.Name(), what)
		case len(args) > 1:
			return fmt.Errorf("%s takes one argument, %s, but got %q too", cmd.Name(), what, args[1])
		}
		return nil
	}
}

// noArgs accepts no arguments.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no argument, but got %q", cmd.Name(), args[0])
	}
	return nil
}

// choice is a flag that takes one of a few words.
type choice struct {
	value string
	words []string
}

// choose makes a choice; the first word is the default.
func choose(words ...string) *choice { return &choice{words[0], words} }

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return "MODE" }

// Set implements pflag.Value.
func (c *choice) Set(s string) error {
	for _, w := range c.words {
		if s == w {
			c.value = s
			return nil
		}
	}
	return fmt.Errorf("must be one of %s", strings.Join(c.words, ", "))
}

// addTo defines the flag and completes it in the shell.
func (c *choice) addTo(cmd *cobra.Command, name, short, usage string) {
	cmd.Flags().VarP(c, name, short, usage+": "+strings.Join(c.words, ", "))
	_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(c.words, cobra.ShellCompDirectiveNoFileComp))
}
