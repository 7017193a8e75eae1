package control

import "testing"

// QEMU's table: what is said of one family alone, on or off, says all.
func TestFamily(t *testing.T) {
	for _, c := range []struct {
		data args
		want string
	}{
		{args{}, "tcp"},
		{args{"ipv4": true, "ipv6": true}, "tcp"},
		{args{"ipv4": true}, "tcp4"},
		{args{"ipv6": false}, "tcp4"},
		{args{"ipv4": true, "ipv6": false}, "tcp4"},
		{args{"ipv6": true}, "tcp6"},
		{args{"ipv4": false}, "tcp6"},
		{args{"ipv4": false, "ipv6": true}, "tcp6"},
		{args{"ipv4": false, "ipv6": false}, ""},
	} {
		if got, err := family(c.data); got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%v: %s, %v, want %s", c.data, got, err, c.want)
		}
	}
}
