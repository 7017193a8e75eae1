// Package bench is the load behind nbd-export bench and the logic of
// nbd-export demo. It knows NBD servers from outside only, through package
// client, so what it measures it measures for any server alike.
package bench
