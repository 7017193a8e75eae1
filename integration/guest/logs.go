package guest

import (
	"fmt"
	"strings"
)

// Logs is for the report of a test that failed: how QEMU is doing, the last
// lines of what the script printed, and those of the console. QEMU's own
// messages are among these once QEMU has ended.
func (g *Guest) Logs(lines int) string {
	how := "running"
	select {
	case <-g.done:
		how = g.cmd.ProcessState.String()
	default:
	}
	return fmt.Sprintf("QEMU, pid %d: %s\n--- output of the guest:\n%s--- its console, and QEMU's messages:\n%s",
		g.PID, how, tail(g.Output(), lines), tail(g.console(), lines))
}

// Console is what the kernel has printed so far.
func (g *Guest) Console() string { return g.console() }

func tail(text string, n int) string {
	all := strings.SplitAfter(text, "\n")
	if len(all) <= n {
		return text
	}
	return "...\n" + strings.Join(all[len(all)-n:], "")
}
