package main

import (
	"errors"

	"github.com/spf13/cobra"
)

// jsonFlag adds --json, and for those who are used to qemu-img its --output.
func jsonFlag(cmd *cobra.Command, asJSON *bool) {
	f := cmd.Flags()
	f.BoolVar(asJSON, "json", false, "print JSON, for scripts")
	f.Var((*output)(asJSON), "output", "`FORMAT` of the output: human, json")
	_ = f.MarkHidden("output")
}

// output is qemu-img's name of a flag, which is set for JSON.
type output bool

func (o *output) Type() string { return "FORMAT" }

func (o *output) String() string {
	if *o {
		return "json"
	}
	return "human"
}

// Set implements pflag.Value.
func (o *output) Set(s string) error {
	if s != "json" && s != "human" {
		return errors.New("must be one of human, json")
	}
	*o = s == "json"
	return nil
}
