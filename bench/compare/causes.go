package main

// causes says, by cell id, what limits a cell whose goal is missed and what was
// tried. The report prints it with the miss; -render writes the report anew from
// raw figures after a change here.
var causes = map[string]string{}
