package main

import (
	"cmp"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// once is a flag that names one thing. Given twice, the first would be forgotten:
// who wants two exports, or orders two servers at once, has to learn that there
// was only one.
type once struct {
	pflag.Value
	given bool
}

// Set implements pflag.Value.
func (o *once) Set(s string) error {
	if o.given {
		return fmt.Errorf("it is given already, as %s, and may be given once", cmp.Or(o.String(), `""`))
	}
	err := o.Value.Set(s)
	o.given = err == nil
	return err
}

// nameOnce makes the flags of cmd that name something, as paths and addresses, once.
// Of modes, sizes and times the last one counts, so that a script can add its own to
// those of its configuration.
func nameOnce(cmd *cobra.Command) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Value.Type() == "string" || f.Name == "port" {
			f.Value = &once{Value: f.Value}
		}
	})
}
